# Pid 1 of a SystemdMachine's namespaces: sets up the file system, then executes systemd.
#
#   $1  its directory:
#         files     is copied to the machine's root
#         mounts    has a directory outside and its mount point inside on each line
#         init.pid  gets this process's id
#
# It is visible only in its mount namespace, and ends with its last process.
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

# The programs of this computer, under a layer for writes.
mount -t overlay machine -o "lowerdir=/usr,upperdir=$root/overlay/upper,workdir=$root/overlay/work" usr
# Of its configuration only the files that programs need to run: no unit, mount, user or secret of
# the computer.
for name in alternatives ld.so.cache ld.so.conf ld.so.conf.d ssl/certs pki/tls/certs pki/ca-trust/extracted; do
    [ ! -e "/etc/$name" ] || cp -a --parents "/etc/$name" .
done
echo 'passwd: files systemd
group: files systemd
hosts: files' >etc/nsswitch.conf
# With an id this is not a "first boot", which would enable all units that the computer has.
echo 0123456789abcdef0123456789abcdef >etc/machine-id
cp -a "$1/files/." .

mount -t proc -o nosuid,nodev,noexec proc proc
# Without this systemd-sysctl would change the computer's kernel. Settings of the network namespace
# stay writable.
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
# A read-only /sys also shows udev and others that they do not own the devices.
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
# The variable shows systemd that it is in a container. The dropped capabilities are those over the
# whole computer.
exec env -i container=awsvid-test PATH=/usr/sbin:/usr/bin \
    setpriv --bounding-set -sys_module,-sys_rawio,-sys_time,-syslog,-sys_boot \
    /usr/lib/systemd/systemd --unit=basic.target
