# Pid 1 of a Node's namespaces: sets up the file system, then only reaps.
#
#   $1  its directory:
#         files     is copied to the node's root
#         cgroups   lists the mounts below /sys/fs/cgroup (file system, options, directory)
#         mounts    has a directory outside and its mount point inside on each line
#         init.pid  gets this process's id
#
# The setup is complete when /run/booted exists.
#
# It is visible only in its namespaces, and ends with this process.
set -eu

# /proc is still the outer one, so this is the id outside.
read -r pid rest </proc/self/stat
echo "$pid" >"$1/init.pid"

root=$1/root
mkdir "$root"
mount -t tmpfs -o mode=0755 node "$root"
cd "$root"
mkdir -m 0755 dev etc home overlay overlay/upper overlay/work proc root run sys tmp usr var var/log var/lib
ln -s usr/bin usr/sbin usr/lib usr/lib64 .
ln -s /run var/run

# The programs of this computer, under a layer for writes. Of its configuration only the files that
# those need.
mount -t overlay node -o "lowerdir=/usr,upperdir=$root/overlay/upper,workdir=$root/overlay/work" usr
for path in /etc/alternatives /etc/java-* /etc/ld.so.* /etc/ssl/certs; do
    [ ! -e "$path" ] || cp -a --parents "$path" .
done
cp -a "$1/files/." .

mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o mode=0755,nosuid,nodev run run
# The kubelet requires some settings of the whole computer. It finds them in files of its own.
mkdir run/sysctl
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=run/sysctl/${setting%=*}
    mkdir -p "${file%/*}"
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "proc/sys/${setting%=*}"
done
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
# Each hierarchy begins at this process's own cgroup, which is the root of its cgroup namespace.
while read -r type options directory; do
    mkdir -p "sys/fs/cgroup/$directory"
    mount -t "$type" -o "$options" "$type" "sys/fs/cgroup/$directory"
done <"$1/cgroups"
mount -t tmpfs -o mode=0755,nosuid dev dev
mkdir dev/pts dev/shm
for name in null zero full random urandom tty kmsg; do
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

echo node >/proc/sys/kernel/hostname
ip link set lo up

mkdir outside
pivot_root . outside
mount --make-rprivate /outside
umount -l /outside
rmdir /outside
# As on every node: containers with mountPropagation need it.
mount --make-rshared /
: >/run/booted
exec env -i PATH=/usr/sbin:/usr/bin bash -c 'trap : CHLD; while :; do sleep 86400 & wait $!; done'
