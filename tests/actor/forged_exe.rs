//! A process that makes the kernel report another file as its executable (T37), as any user can do
//! it: `PR_SET_MM_MAP` of prctl(2) takes CAP_CHECKPOINT_RESTORE in the user namespace of the
//! calling thread, and it changes the memory's executable. A helper that shares the memory has
//! that capability in a user namespace of its own. The process itself stays in the host's.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::wait::{WaitStatus, waitpid};

use crate::process::share_memory;

/// `struct prctl_mm_map` of linux/prctl.h.
#[repr(C)]
#[derive(Debug, Default)]
struct MemoryMap {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

struct Request<'p> {
    path: &'p CStr,
    map: MemoryMap,
}

/// Makes the kernel report this file as the executable of the calling process. Any file that the
/// user may read and execute will do.
pub(crate) fn show_as(file: &Path) {
    leave_own_file();
    let path = CString::new(file.as_os_str().as_bytes()).unwrap();
    let mut request = Request {
        path: &path,
        map: current_map(),
    };
    let helper = share_memory(forge, (&raw mut request).cast());
    assert_eq!(waitpid(helper, None), Ok(WaitStatus::Exited(helper, 0)));
    assert_eq!(fs::read_link("/proc/self/exe").unwrap(), file);
}

/// Replaces all memory that is mapped from the executable by anonymous memory with the same bytes:
/// the kernel changes the executable only if none is mapped.
fn leave_own_file() {
    let own = fs::read_link("/proc/self/exe").unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for line in maps.lines() {
        let mut fields = line.splitn(6, ' ');
        let [range, rights, _, _, _] = [(); 5].map(|()| fields.next().unwrap());
        if Path::new(fields.next().unwrap_or_default().trim_start()) != own {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16).unwrap());
        let right = |letter, flag| if rights.contains(letter) { flag } else { 0 };
        let rights = right('r', libc::PROT_READ)
            | right('w', libc::PROT_WRITE)
            | right('x', libc::PROT_EXEC);
        // SAFETY: the new memory has the same bytes and rights as that which it replaces, and the
        // kernel replaces it in one call.
        unsafe { replace(start, end - start, rights) };
    }
}

unsafe fn replace(start: usize, length: usize, rights: libc::c_int) {
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let writable = libc::PROT_READ | libc::PROT_WRITE;
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let start = std::ptr::without_provenance_mut::<libc::c_void>(start);
    // SAFETY: `start` is mapped and readable for `length` bytes, and `copy` is new memory.
    unsafe {
        let copy = libc::mmap(std::ptr::null_mut(), length, writable, anonymous, -1, 0);
        assert_ne!(copy, libc::MAP_FAILED);
        std::ptr::copy_nonoverlapping(start.cast::<u8>(), copy.cast::<u8>(), length);
        assert_eq!(libc::mprotect(copy, length, rights), 0);
        assert_eq!(libc::mremap(copy, length, length, fixed, start), start);
    }
}

/// Returns the values in effect, without an executable.
fn current_map() -> MemoryMap {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<u64> = fields
        .split_ascii_whitespace()
        .map(|field| field.parse().unwrap_or_default())
        .collect();
    // proc_pid_stat(5) counts from 1, and two fields are before these.
    let field = |number: usize| fields[number - 3];
    // SAFETY: a growth by 0 changes nothing.
    let brk = unsafe { libc::sbrk(0) } as u64;
    MemoryMap {
        start_code: field(26),
        end_code: field(27),
        start_data: field(45),
        end_data: field(46),
        start_brk: field(47),
        brk,
        start_stack: field(28),
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
        ..MemoryMap::default()
    }
}

/// Is the helper: makes nothing but system calls, and ends with 0 if all of them succeed.
extern "C" fn forge(request: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the request is the caller's, which waits for this process, and this process shares
    // that memory.
    unsafe {
        let request = &mut *request.cast::<Request<'_>>();
        if libc::unshare(libc::CLONE_NEWUSER) != 0 {
            libc::_exit(1);
        }
        let file: RawFd = libc::open(request.path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        request.map.exe_fd = file.cast_unsigned();
        let result = libc::prctl(
            libc::PR_SET_MM,
            libc::PR_SET_MM_MAP,
            &raw const request.map,
            size_of::<MemoryMap>(),
            0,
        );
        libc::_exit(if result == 0 { 0 } else { 2 })
    }
}
