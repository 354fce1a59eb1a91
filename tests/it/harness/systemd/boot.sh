# Pid 1 of the namespaces of its own that a SystemdMachine lives in: makes its file system, then becomes systemd.
#
#   $1  a directory for it: `files` in it is copied to the machine's root, each line of `mounts` is a directory outside and
#       where it is to be mounted inside, `init.pid` gets this process's id
#
# Nothing of it is visible outside of its mount namespace, and all of it is gone when its last process is.
set -eu

# /proc is still the outer one, so this is the id outside.
read -r pid rest </proc/self/stat
echo "$pid" >"$1/init.pid"

root=$1/root
mkdir "$root"
mount -t tmpfs -o mode=0755 machine "$root"
cd "$root"
mkdir -m 0755 dev etc home overlay overlay/upper overlay/work proc root run sys tmp usr var
ln -s usr/bin usr/sbin usr/lib usr/lib64 .

# The programs of this computer, under a layer that takes what is written.
mount -t overlay machine -o "lowerdir=/usr,upperdir=$root/overlay/upper,workdir=$root/overlay/work" usr
# Of its configuration only what programs need to run at all: no unit, mount, user or secret of the computer.
for name in alternatives ld.so.cache ld.so.conf ld.so.conf.d ssl/certs pki/tls/certs pki/ca-trust/extracted; do
    [ ! -e "/etc/$name" ] || cp -a --parents "/etc/$name" .
done
echo 'passwd: files systemd
group: files systemd
hosts: files' >etc/nsswitch.conf
# With an id the first boot is no "first boot", which would enable every unit that the computer has installed.
echo 0123456789abcdef0123456789abcdef >etc/machine-id
cp -a "$1/files/." .

mount -t proc -o nosuid,nodev,noexec proc proc
# Without this systemd-sysctl would change the computer's kernel. What belongs to the network namespace stays writable.
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
# A read-only /sys also tells udev and others that the devices are somebody else's.
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755,nosuid,nodev run run
mount -t tmpfs -o mode=1777,nosuid,nodev tmp tmp
mount -t tmpfs -o mode=0755,nosuid dev dev
mkdir dev/pts dev/shm
for name in null zero full random urandom tty; do
    : >"dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mount -t devpts -o newinstance,ptmxmode=0666,nosuid,noexec devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
while read -r outside inside; do
    mkdir -p ".$inside"
    mount --bind "$outside" ".$inside"
done <"$1/mounts"
ip link set lo up

mkdir outside
pivot_root . outside
umount -l /outside
rmdir /outside
# The variable tells systemd that it is in a container; the capabilities are those over the computer as a whole.
exec env -i container=awsvid-test PATH=/usr/sbin:/usr/bin \
    setpriv --bounding-set -sys_module,-sys_rawio,-sys_time,-syslog,-sys_boot \
    /usr/lib/systemd/systemd --unit=basic.target
