// The common part of all clients in JavaScript: their arguments and their output.
import { setTimeout } from "node:timers/promises";
import { inspect } from "node:util";

export const [endpoint, bucket, key, times, pause] = process.argv.slice(2);

Error.stackTraceLimit = 0;

// Reads the object TIMES times, and prints one line with each result.
export async function run(read) {
  for (let i = 0; i < Number(times); i++) {
    if (i > 0) await setTimeout(Number(pause) * 1000);
    try {
      console.log("read", (await read()).replace(/\n$/, ""));
      process.exitCode = 0;
    } catch (error) {
      // As Node.js shows an uncaught error, with its causes and properties, but without the stack.
      console.log("failed", inspect(error).replace(/\s+/g, " "));
      process.exitCode = 1;
    }
  }
}
