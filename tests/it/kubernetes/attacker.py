# The program in the pods of attacks.rs: `victim` runs until the pod ends, each other scene once.
# Every line of output has the result of one attempt: the status of a response, or the name of the
# kernel's error.
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
import time

HERE = ("127.0.0.1", 974)
MEETING = "/shared/victim.sock"
CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def system_call(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), "system call")


def answer(connection):
    connection.settimeout(20)
    connection.sendall(b"GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: any\r\n\r\n")
    read = b""
    while part := connection.recv(65536):
        read += part
    return read.split(b" ")[1].decode()


def tcp(address=HERE, source=None):
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.settimeout(10)
    if source:
        made.bind((source, 0))
    made.connect(address)
    return made


def fetch(connect=tcp):
    """Repeats a request that gets a 503, as SDKs do: the agent may not know a new pod yet."""
    for _ in range(20):
        status = answer(connect())
        if status != "503":
            break
        time.sleep(0.2)
    return status


def attempt(label, what):
    try:
        result = what()
    except TimeoutError:
        result = "timeout"
    except OSError as error:
        result = errno.errorcode[error.errno]
    print(f"{label}: {result}", flush=True)


def meet(word, descriptors):
    """Sends the victim a word and these descriptors over the shared volume, and returns the connection."""
    meeting = socket.socket(socket.AF_UNIX)
    while meeting.connect_ex(MEETING) != 0:
        time.sleep(0.02)
    socket.send_fds(meeting, [word], descriptors)
    return meeting


def victim():
    attempt("own", fetch)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(MEETING)
    listener.listen()
    while True:
        meeting, _ = listener.accept()
        word, descriptors, _, _ = socket.recv_fds(meeting, 16, 1)
        if word == b"take":
            taken = socket.socket(fileno=descriptors[0])
            taken.connect(HERE)
            meeting.sendall(answer(taken).encode())
            taken.close()
            continue
        given = tcp()
        socket.send_fds(meeting, [b"given"], [given.fileno()])
        if word == b"give alone":
            given.close()
            meeting.sendall(b"closed")
        # Until the other has sent its request.
        meeting.recv(1)


def given(word):
    meeting = meet(word, [])
    _, descriptors, _, _ = socket.recv_fds(meeting, 5, 1)
    if word == b"give alone":
        meeting.recv(6)
    attempt("given", lambda: answer(socket.socket(fileno=descriptors[0])))


def taken():
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    meeting = meet(b"take", [made.fileno()])
    attempt("taken", lambda: meeting.recv(16).decode())


def new_network():
    before, unconnected = tcp(), socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    system_call(libc.unshare(CLONE_NEWNET))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh14x", b"lo", 0x1)
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    attempt("new network", tcp)
    attempt("connected before", lambda: answer(before))
    unconnected.connect(HERE)
    attempt("made before", lambda: answer(unconnected))


def source(own, other):
    attempt("another loopback address", lambda: fetch(lambda: tcp(source="127.0.0.2")))
    attempt("the pod's address", lambda: fetch(lambda: tcp(source=own)))
    attempt("to the pod's address", lambda: tcp((own, 974)))
    attempt("to the other pod", lambda: tcp((other, 974)))
    attempt("to the other pod from a loopback address", lambda: tcp((other, 974), source="127.0.0.1"))


def nested(own, other, container):
    """Enters a cgroup below its own with the whole name of another pod's container."""
    for place in [place for place, _, _ in os.walk("/cgroup") if os.path.basename(os.path.dirname(place)) == f"pod{own}"]:
        if str(os.getpid()) not in processes(place):
            continue
        forged = os.path.join(place, "kubepods", "besteffort", f"pod{other}", container)
        os.makedirs(forged)
        try:
            with open(os.path.join(forged, "cgroup.procs"), "w") as file:
                file.write("0")
        except OSError:
            # In the v1 hierarchies a new cgroup may not be ready to accept a process.
            pass
    with open("/proc/self/cgroup") as file:
        [path] = [line.strip() for line in file if line.startswith("0::")]
    print("moved:", path.endswith(f"pod{other}/{container}"), flush=True)
    attempt("nested", fetch)


def processes(place):
    with open(os.path.join(place, "cgroup.procs")) as file:
        return file.read().split()


def enter(other):
    """Enters the network namespace in which that pod has its address."""
    attempt("own", fetch)
    for name in os.listdir("/netns"):
        try:
            file = open(os.path.join("/netns", name))
        except FileNotFoundError:
            continue  # That pod has ended.
        try:
            with file:
                system_call(libc.setns(file.fileno(), CLONE_NEWNET))
            socket.socket(socket.AF_INET, socket.SOCK_STREAM).bind((other, 0))
        except OSError:
            continue  # It is another pod's, or no namespace is mounted there any more.
        attempt("entered", fetch)
        return
    print("nobody has the address")


def destroy():
    """Destroys a socket, as `ss -K` does."""
    attempt("before", fetch)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        packed = socket.inet_pton(family, address).ljust(16, b"\0")
        request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 1 << 10)  # TCPF_LISTEN
        request += struct.pack("!HH", 974, 0) + packed + bytes(16) + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
        # SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK
        netlink.send(struct.pack("=IHHII", 16 + len(request), 21, 0x1 | 0x4, 0, 0) + request)
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        print(f"destroyed: {errno.errorcode.get(code, code)}", flush=True)
    begun = time.monotonic()
    while True:
        try:
            connection = tcp()
            break
        except ConnectionRefusedError:
            assert time.monotonic() - begun < 20
            time.sleep(0.01)
    attempt("after", lambda: answer(connection))


def mounted():
    """The directory of the unix socket, mounted read-only."""
    print("files:", *sorted(os.listdir("/run/awsvid")), flush=True)
    path = "/run/awsvid/awsvid.sock"
    attempt("remove", lambda: os.unlink(path))
    attempt("replace", lambda: socket.socket(socket.AF_UNIX).bind(path + ".fake"))
    remount = 0x20
    attempt("mount again", lambda: system_call(libc.mount(b"none", b"/run/awsvid", None, remount, None)))

    def connect():
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection

    attempt("request", lambda: fetch(connect))


SCENES = {
    "victim": victim,
    "given": lambda: given(b"give"),
    "given-alone": lambda: given(b"give alone"),
    "taken": taken,
    "unshared": new_network,
    "source": source,
    "nested": nested,
    "enter": enter,
    "destroy": destroy,
    "mounted": mounted,
    "request": lambda: attempt("request", fetch),
}
SCENES[sys.argv[1]](*sys.argv[2:])
