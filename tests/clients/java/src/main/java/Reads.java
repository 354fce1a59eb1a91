import java.io.PrintWriter;
import java.io.StringWriter;
import java.util.concurrent.Callable;

/** The common part of all clients in Java: their arguments and their output. */
record Reads(String endpoint, String bucket, String key, int times, double pause) {

    static Reads of(String[] arguments) {
        if (arguments.length != 5) {
            System.err.println("usage: ENDPOINT BUCKET KEY TIMES PAUSE");
            System.exit(2);
        }
        return new Reads(arguments[0], arguments[1], arguments[2],
                Integer.parseInt(arguments[3]), Double.parseDouble(arguments[4]));
    }

    /** Reads the object as often as asked, says on one line each time what came of it, and ends the program. */
    void run(Callable<String> read) throws InterruptedException {
        int status = 1;
        for (int i = 0; i < times; i++) {
            if (i > 0) {
                Thread.sleep((long) (pause * 1000));
            }
            try {
                System.out.println("read " + read.call().replaceFirst("\n$", ""));
                status = 0;
            } catch (Exception e) {
                System.out.println("failed " + oneLine(e));
                status = 1;
            }
        }
        System.exit(status);
    }

    /** All that its stack trace would show but the stack: its message, those of its causes and of what it suppressed. */
    private static String oneLine(Throwable error) {
        StringWriter trace = new StringWriter();
        error.printStackTrace(new PrintWriter(trace));
        return trace.toString().replaceAll("\n\t+(at|\\.\\.\\.) .*", "").replaceAll("\\s+", " ");
    }
}
