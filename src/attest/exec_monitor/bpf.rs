//! The part of bpf(2) that one small program needs. The crates that load programs require a
//! compiler for eBPF, so none is used.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::ffi::{CStr, c_void};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Commands, types and flags of linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const MAP_TYPE_ARRAY: u32 = 2;
const MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
/// Helper functions. None of them requires a licence that is compatible with the GPL.
pub(super) const MAP_LOOKUP_ELEM: i32 = 1;
pub(super) const GET_CURRENT_PID_TGID: i32 = 14;
pub(super) const GET_CURRENT_ANCESTOR_CGROUP_ID: i32 = 123;
/// The register with the address of the end of the stack.
pub(super) const FRAME: u8 = 10;

/// One instruction, `struct bpf_insn`: one or two words of eight bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Instruction {
    words: [u64; 2],
    length: usize,
}

impl Instruction {
    fn new(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Self {
        let registers = u64::from(target) | u64::from(source) << 4;
        let offset = u64::from(offset.cast_unsigned());
        let word = u64::from(code)
            | registers << 8
            | offset << 16
            | u64::from(immediate.cast_unsigned()) << 32;
        Self {
            words: [word, 0],
            length: 1,
        }
    }

    fn wide(target: u8, source: u8, value: u64) -> Self {
        let [low, high] = [value & u64::from(u32::MAX), value >> 32];
        let mut first = Self::new(0x18, target, source, 0, 0);
        first.words = [first.words[0] | low << 32, high << 32];
        Self { length: 2, ..first }
    }

    /// Loads a number of 64 bits into a register.
    pub(super) fn load(target: u8, value: u64) -> Self {
        Self::wide(target, 0, value)
    }

    /// Loads the address of the map with this descriptor.
    pub(super) fn load_map(target: u8, map: RawFd) -> Self {
        Self::wide(target, 1, u64::from(map.cast_unsigned()))
    }

    pub(super) fn set(target: u8, value: i32) -> Self {
        Self::new(0xb7, target, 0, 0, value)
    }

    pub(super) fn copy(target: u8, source: u8) -> Self {
        Self::new(0xbf, target, source, 0, 0)
    }

    pub(super) fn add(target: u8, value: i32) -> Self {
        Self::new(0x07, target, 0, 0, value)
    }

    pub(super) fn multiply(target: u8, source: u8) -> Self {
        Self::new(0x2f, target, source, 0, 0)
    }

    pub(super) fn exclusive_or(target: u8, source: u8) -> Self {
        Self::new(0xaf, target, source, 0, 0)
    }

    pub(super) fn shift_right(target: u8, bits: i32) -> Self {
        Self::new(0x77, target, 0, 0, bits)
    }

    pub(super) fn store_u32(target: u8, offset: i16, source: u8) -> Self {
        Self::new(0x63, target, source, offset, 0)
    }

    pub(super) fn atomic_add_u64(target: u8, offset: i16, source: u8) -> Self {
        Self::new(0xdb, target, source, offset, 0)
    }

    /// Skips `words` words if the register is 0.
    pub(super) fn jump_if_zero(register: u8, words: i16) -> Self {
        Self::new(0x15, register, 0, words, 0)
    }

    pub(super) fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }

    pub(super) fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// A sequence of instructions, as words.
#[derive(Debug, Default)]
pub(super) struct BpfProgram {
    words: Vec<u64>,
    /// The jumps without a target yet: the position of each, and its register.
    jumps: Vec<(usize, u8)>,
}

impl BpfProgram {
    pub(super) fn extend(&mut self, instructions: impl IntoIterator<Item = Instruction>) {
        for instruction in instructions {
            self.words.extend(&instruction.words[..instruction.length]);
        }
    }

    /// Jumps to [`BpfProgram::end`] if the register is 0.
    pub(super) fn jump_to_end_if_zero(&mut self, register: u8) {
        self.jumps.push((self.words.len(), register));
        self.words.push(0);
    }

    /// Marks the position that all jumps lead to.
    pub(super) fn end(&mut self) {
        for (at, register) in self.jumps.drain(..) {
            let words = i16::try_from(self.words.len() - at - 1).unwrap_or(i16::MAX);
            self.words[at] = Instruction::jump_if_zero(register, words).words[0];
        }
    }
}

/// The used attributes of `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The used attributes of `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: *const u64,
    licence: *const libc::c_char,
}

/// The used attributes of `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct RawTracepointOpen {
    name: *const libc::c_char,
    program: u32,
    padding: u32,
}

/// Creates an array of `entries` numbers of 64 bits, all 0.
pub(super) fn create_counters(entries: u32) -> io::Result<OwnedFd> {
    let attributes = MapCreate {
        kind: MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: 8,
        max_entries: entries,
        flags: MMAPABLE,
    };
    // SAFETY: the attributes are those of the command, and hold no addresses.
    unsafe { bpf(MAP_CREATE, &attributes) }
}

/// Makes the kernel verify and load a program for raw tracepoints.
pub(super) fn load(program: &BpfProgram) -> io::Result<OwnedFd> {
    let attributes = ProgLoad {
        kind: PROG_TYPE_RAW_TRACEPOINT,
        count: u32::try_from(program.words.len()).map_err(io::Error::other)?,
        instructions: program.words.as_ptr(),
        licence: c"Apache-2.0".as_ptr(),
    };
    // SAFETY: the attributes are those of the command. The kernel reads `count` words and a string
    // from these addresses, which live through the call.
    unsafe { bpf(PROG_LOAD, &attributes) }
}

/// Runs the program at each event of this tracepoint, until the descriptor is closed.
pub(super) fn attach_raw_tracepoint(name: &CStr, program: &OwnedFd) -> io::Result<OwnedFd> {
    let program = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = RawTracepointOpen {
        name: name.as_ptr(),
        program,
        padding: 0,
    };
    // SAFETY: the attributes are those of the command. The kernel reads a string from this address,
    // which lives through the call.
    unsafe { bpf(RAW_TRACEPOINT_OPEN, &attributes) }
}

/// Calls bpf(2) with a command that returns a descriptor.
///
/// # Safety
/// `attributes` has to be what the command takes, and the addresses in it valid.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller ensures it. The kernel reads `size_of::<T>()` bytes, and takes missing
    // fields as 0.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the call succeeded, so this is a new descriptor without another owner. All of them
    // are closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The numbers of an array, in memory that is shared with the kernel.
pub(super) struct Counters {
    memory: NonNull<c_void>,
    length: NonZeroUsize,
}

impl Counters {
    /// Maps the array with `entries` entries for reading.
    pub(super) fn map(array: &OwnedFd, entries: u32) -> io::Result<Self> {
        let length = usize::try_from(entries)
            .ok()
            .and_then(|entries| entries.checked_mul(size_of::<u64>()));
        let length = length
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice, which `drop` ends.
        let memory = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                array,
                0,
            )?
        };
        Ok(Self { memory, length })
    }

    /// Returns the number at `index`, or 0 beyond the end.
    pub(super) fn get(&self, index: u32) -> u64 {
        let at = index as usize;
        if at >= self.length.get() / size_of::<u64>() {
            return 0;
        }
        // SAFETY: the address is within the mapping, which begins at a page and lives as long as
        // `self`. The kernel changes the number atomically, and it is read only here.
        unsafe { AtomicU64::from_ptr(self.memory.cast::<u64>().add(at).as_ptr()) }
            .load(Ordering::Acquire)
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and nothing else refers to it.
        let _ = unsafe { munmap(self.memory, self.length.get()) };
    }
}

// SAFETY: any thread may read and unmap the mapping.
unsafe impl Send for Counters {}
// SAFETY: as above, and `get` reads atomically.
unsafe impl Sync for Counters {}
