//! Which system calls a container may make: Docker's default profile, as an OCI runtime reads it
//! and as the kernel takes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::sync::Arc;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The file in `data/`: Docker's default profile, grouped by what an entry depends on.
#[derive(Deserialize)]
struct Profile {
    default_errno: i32,
    personality: Vec<u64>,
    deny_socket_families: Vec<u64>,
    namespace_flags: u64,
    architectures: BTreeMap<String, Architecture>,
    with_capability: BTreeMap<String, Vec<String>>,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Architecture {
    names: Vec<String>,
    allow: Vec<String>,
}

/// A filter in the words of an OCI runtime configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    default_action: Action,
    default_errno_ret: i32,
    architectures: Vec<String>,
    syscalls: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Vec<String>,
    action: Action,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    errno_ret: Option<i32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    args: Vec<Argument>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Action {
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
}

/// What an argument of the call must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: Comparison,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Comparison {
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    /// Of the bits of `value` those of `value_two`.
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

impl Action {
    fn compiled(self, errno: Option<i32>) -> ScmpAction {
        match self {
            Self::Allow => ScmpAction::Allow,
            Self::Errno => ScmpAction::Errno(errno.unwrap_or(libc::EPERM)),
        }
    }
}

impl Argument {
    fn compiled(&self) -> ScmpArgCompare {
        let (op, value) = match self.op {
            Comparison::Equal => (ScmpCompareOp::Equal, self.value),
            Comparison::NotEqual => (ScmpCompareOp::NotEqual, self.value),
            Comparison::MaskedEqual => (ScmpCompareOp::MaskedEqual(self.value), self.value_two),
        };
        ScmpArgCompare::new(self.index, op, value)
    }
}

impl Filter {
    /// For a container with these capabilities, on a machine of this architecture ("x86_64").
    pub(super) fn new(capabilities: &BTreeSet<&'static str>, architecture: &str) -> Self {
        let profile: Profile = serde_json::from_str(include_str!("data/seccomp.json"))
            .expect("the profile is part of the program and a test parses it");
        let mut allow: BTreeSet<String> = profile.allow.into_iter().collect();
        for (capability, calls) in profile.with_capability {
            if capabilities.contains(capability.as_str()) {
                allow.extend(calls);
            }
        }
        let mut architectures = Vec::new();
        let mut known = profile.architectures;
        if let Some(found) = known.remove(architecture) {
            architectures = found.names;
            allow.extend(found.allow);
        }
        let rule = |name: &str, args: Vec<Argument>| Rule {
            names: vec![name.to_owned()],
            action: Action::Allow,
            errno_ret: None,
            args,
        };
        let argument = |op, value| Argument {
            index: 0,
            value,
            value_two: 0,
            op,
        };
        let mut syscalls = vec![Rule {
            names: allow.into_iter().collect(),
            ..rule("", Vec::new())
        }];
        if !capabilities.contains("CAP_SYS_ADMIN") {
            // New processes, but no new namespaces. clone3 hides its flags in memory:
            // ENOSYS makes libraries fall back to clone.
            let none = argument(Comparison::MaskedEqual, profile.namespace_flags);
            syscalls.push(rule("clone", vec![none]));
            syscalls.push(Rule {
                action: Action::Errno,
                errno_ret: Some(libc::ENOSYS),
                ..rule("clone3", Vec::new())
            });
        }
        for value in profile.personality {
            let this = argument(Comparison::Equal, value);
            syscalls.push(rule("personality", vec![this]));
        }
        for family in profile.deny_socket_families {
            let other = argument(Comparison::NotEqual, family);
            syscalls.push(rule("socket", vec![other]));
        }
        Self {
            default_action: Action::Errno,
            default_errno_ret: profile.default_errno,
            architectures,
            syscalls,
        }
    }

    /// The same as a program of the kernel's (classic BPF). Takes milliseconds.
    ///
    /// # Errors
    /// What this machine's libseccomp has refused.
    pub(super) fn compile(&self) -> Result<Vec<u8>, String> {
        let program = self.compiled();
        let program = program.map_err(|err| format!("compile the seccomp filter: {err}"))?;
        let file = memfd_create("seccomp", MFdFlags::MFD_CLOEXEC);
        let mut file = File::from(file.map_err(|err| format!("make a file in memory: {err}"))?);
        let exported = program.export_bpf(&file);
        exported.map_err(|err| format!("compile the seccomp filter: {err}"))?;
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .map_err(|err| format!("read the seccomp filter: {err}"))?;
        Ok(bytes)
    }

    fn compiled(&self) -> Result<ScmpFilterContext, SeccompError> {
        let default = self.default_action.compiled(Some(self.default_errno_ret));
        let mut program = ScmpFilterContext::new(default)?;
        for architecture in &self.architectures {
            program.add_arch(architecture.parse()?)?;
        }
        for rule in &self.syscalls {
            let action = rule.action.compiled(rule.errno_ret);
            let args: Vec<ScmpArgCompare> = rule.args.iter().map(Argument::compiled).collect();
            for name in &rule.names {
                // One that this machine has not heard of stays forbidden.
                if let Ok(call) = ScmpSyscall::from_name(name) {
                    program.add_rule_conditional(action, call, &args)?;
                }
            }
        }
        Ok(program)
    }
}

/// Compiled filters: as a rule all containers have the same.
#[derive(Default)]
pub(super) struct Compiled(Mutex<Vec<(Filter, Arc<[u8]>)>>);

impl Compiled {
    /// As many are kept. Containers have filters of their own by their capabilities only.
    const MAX: usize = 16;

    /// The program, compiled when it is asked for first.
    pub(super) fn program(&self, filter: &Filter) -> Result<Arc<[u8]>, String> {
        // Who wants the same meanwhile waits for it.
        let mut known = self.0.lock();
        if let Some((_, program)) = known.iter().find(|(known, _)| known == filter) {
            return Ok(program.clone());
        }
        let program: Arc<[u8]> = filter.compile()?.into();
        known.truncate(Self::MAX - 1);
        known.insert(0, (filter.clone(), program.clone()));
        Ok(program)
    }
}

/// Confines this process, and all that come from it, to what the program allows, for good. Needs
/// CAP_SYS_ADMIN, or no_new_privs.
///
/// # Errors
/// It is no program, or the kernel refuses it.
pub(super) fn load(program: &[u8]) -> Result<(), String> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    let failed = |why: &dyn std::fmt::Display| format!("load the seccomp filter: {why}");
    let length = u16::try_from(program.len() / INSTRUCTION);
    let length = length.map_err(|_| failed(&"it is too long"))?;
    if length == 0 || !program.len().is_multiple_of(INSTRUCTION) {
        return Err(failed(&"it is damaged"));
    }
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies that many instructions from there and writes nothing.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::c_ulong::from(libc::SECCOMP_MODE_FILTER),
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(failed(&std::io::Error::last_os_error())),
    }
}

// System calls have other numbers elsewhere.
#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    fn allow() -> u32 {
        0x7fff_0000
    }

    fn refuse(errno: i32) -> u32 {
        0x0005_0000 | u32::try_from(errno).unwrap()
    }

    /// What the kernel would do: the few instructions of classic BPF that a filter consists of.
    fn answer(program: &[u8], architecture: u32, call: i64, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(i32::try_from(call).unwrap().to_le_bytes());
        data.extend(architecture.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        data.extend(args.iter().flat_map(|arg| arg.to_le_bytes()));
        let (mut place, mut register) = (0, 0u32);
        loop {
            let instruction = &program[place * 8..place * 8 + 8];
            let code = u16::from_le_bytes([instruction[0], instruction[1]]);
            let [yes, no] = [instruction[2], instruction[3]].map(usize::from);
            let constant = u32::from_le_bytes(instruction[4..].try_into().unwrap());
            place += 1;
            let jump = |holds: bool| if holds { yes } else { no };
            match code {
                // Load, and, jump, equal, greater, greater or equal, any bit, return.
                0x20 => {
                    let at = constant as usize;
                    register = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                0x54 => register &= constant,
                0x05 => place += constant as usize,
                0x15 => place += jump(register == constant),
                0x25 => place += jump(register > constant),
                0x35 => place += jump(register >= constant),
                0x45 => place += jump(register & constant != 0),
                0x06 => return constant,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn program(capabilities: &[&'static str]) -> Vec<u8> {
        let capabilities = capabilities.iter().copied().collect();
        Filter::new(&capabilities, "x86_64").compile().unwrap()
    }

    fn first(value: u64) -> [u64; 6] {
        [value, 0, 0, 0, 0, 0]
    }

    #[test]
    fn what_containers_do_is_allowed_and_what_changes_the_machine_is_not() {
        let program = program(&["CAP_CHOWN", "CAP_SYS_CHROOT"]);
        for call in [
            libc::SYS_read,
            libc::SYS_execve,
            libc::SYS_chroot,
            libc::SYS_arch_prctl,
            libc::SYS_futex,
            libc::SYS_ptrace,
        ] {
            assert_eq!(answer(&program, X86_64, call, [0; 6]), allow(), "{call}");
        }
        for call in [
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_open_by_handle_at,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_pivot_root,
            libc::SYS_swapon,
            libc::SYS_reboot,
            libc::SYS_settimeofday,
            libc::SYS_acct,
            libc::SYS_perf_event_open,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
        ] {
            let said = answer(&program, X86_64, call, [0; 6]);
            assert_eq!(said, refuse(libc::EPERM), "{call}");
        }
        // No call of this number.
        assert_eq!(answer(&program, X86_64, 5000, [0; 6]), refuse(libc::EPERM));
    }

    #[test]
    fn arguments_decide_where_a_call_is_allowed_in_part() {
        let program = program(&[]);
        let said = |call, value| answer(&program, X86_64, call, first(value));
        let thread = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;
        assert_eq!(said(libc::SYS_clone, thread), allow());
        for namespace in [
            libc::CLONE_NEWNS,
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWNET,
            libc::CLONE_NEWPID,
        ] {
            let flags = thread | namespace as u64;
            assert_eq!(said(libc::SYS_clone, flags), refuse(libc::EPERM));
        }
        assert_eq!(said(libc::SYS_clone3, 0), refuse(libc::ENOSYS));
        assert_eq!(said(libc::SYS_personality, 0), allow());
        assert_eq!(said(libc::SYS_personality, 0x1234), refuse(libc::EPERM));
        assert_eq!(said(libc::SYS_socket, libc::AF_INET as u64), allow());
        let vsock = said(libc::SYS_socket, libc::AF_VSOCK as u64);
        assert_eq!(vsock, refuse(libc::EPERM));
    }

    #[test]
    fn capabilities_bring_their_calls() {
        let program = program(&["CAP_SYS_ADMIN"]);
        let said = |call, value| answer(&program, X86_64, call, first(value));
        for call in [
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_clone3,
        ] {
            assert_eq!(said(call, 0), allow(), "{call}");
        }
        assert_eq!(said(libc::SYS_clone, libc::CLONE_NEWNS as u64), allow());
        assert_eq!(said(libc::SYS_chroot, 0), refuse(libc::EPERM));
    }

    #[test]
    fn programs_for_older_machines_run_and_those_for_others_do_not() {
        let program = program(&[]);
        // read is number 3 and mount number 21 there.
        assert_eq!(answer(&program, I386, 3, [0; 6]), allow());
        assert_eq!(answer(&program, I386, 21, [0; 6]), refuse(libc::EPERM));
        let arm = answer(&program, 0x4000_0028, 3, [0; 6]);
        assert!(arm != allow(), "{arm:#x}");
    }

    #[test]
    fn a_runtime_configuration_says_the_same() {
        let filter = Filter::new(&BTreeSet::new(), "x86_64");
        let json = serde_json::to_value(&filter).unwrap();
        assert_eq!(json["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(json["architectures"][0], "SCMP_ARCH_X86_64");
        let clone = &json["syscalls"][1];
        assert_eq!(clone["args"][0]["op"], "SCMP_CMP_MASKED_EQ");
        assert_eq!(serde_json::from_value::<Filter>(json).unwrap(), filter);
    }

    #[test]
    fn equal_filters_are_compiled_once() {
        let compiled = Compiled::default();
        let plain = Filter::new(&BTreeSet::new(), "x86_64");
        let first = compiled.program(&plain).unwrap();
        let admin = Filter::new(&BTreeSet::from(["CAP_SYS_ADMIN"]), "x86_64");
        assert_ne!(first, compiled.program(&admin).unwrap());
        assert!(Arc::ptr_eq(&first, &compiled.program(&plain).unwrap()));
    }

    #[test]
    fn what_is_no_program_is_not_loaded() {
        assert!(load(&[]).unwrap_err().contains("damaged"));
        assert!(load(&[0; 7]).unwrap_err().contains("damaged"));
        assert!(load(&[0; 8 << 16]).unwrap_err().contains("too long"));
    }
}
