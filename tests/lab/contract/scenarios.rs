//! What is run, on what, and what breaks in it.

/// Seconds that effects and releases may take in a broken run.
pub(super) const DEADLINE: u32 = 2;
/// Milliseconds by which a late effect is late: past its deadline, and past the
/// two seconds for which the next call waits.
pub(super) const LATE: u32 = 5000;

/// What is run and what it may do.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// On a guest with an agent.
    pub(super) guest: bool,
    /// On a domain that is off.
    pub(super) stopped: bool,
    /// Snapshots before it, with what makes them beside the name.
    pub(super) before: &'static [&'static str],
    pub(super) making: &'static [&'static str],
    /// The command; `VM` is the domain.
    pub(super) action: &'static [&'static str],
    /// The snapshot that it makes.
    pub(super) makes: Option<&'static str>,
    /// Those that it may take away.
    pub(super) drops: &'static [&'static str],
}

const PLAIN: Scenario = Scenario {
    name: "",
    guest: false,
    stopped: false,
    before: &[],
    making: &["--consistency", "crash"],
    action: &[],
    makes: Some("new"),
    drops: &[],
};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "create frozen",
        guest: true,
        action: &["create", "VM", "new", "--consistency", "filesystem"],
        ..PLAIN
    },
    Scenario {
        name: "create suspended",
        action: &["create", "VM", "new", "--consistency", "suspend"],
        ..PLAIN
    },
    Scenario {
        name: "create crash",
        before: &["one"],
        action: &["create", "VM", "new", "--consistency", "crash"],
        ..PLAIN
    },
    Scenario {
        name: "create memory",
        action: &["create", "VM", "new", "--memory"],
        ..PLAIN
    },
    Scenario {
        name: "create internal",
        action: &["create", "VM", "new", "--kind", "internal"],
        ..PLAIN
    },
    Scenario {
        name: "create stopped",
        stopped: true,
        making: &[],
        action: &["create", "VM", "new"],
        ..PLAIN
    },
    Scenario {
        name: "create guarded",
        action: &["create", "VM", "new", "--revert-unless-confirmed", "1h"],
        ..PLAIN
    },
    Scenario {
        name: "revert disk-only",
        before: &["one", "two"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert memory",
        before: &["one"],
        making: &["--memory"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert disks alone",
        before: &["one", "two"],
        making: &["--memory"],
        action: &["revert", "VM", "one", "--disks-only"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert internal",
        before: &["one"],
        making: &["--kind", "internal"],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert stopped",
        stopped: true,
        before: &["one"],
        making: &[],
        action: &["revert", "VM", "one"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "revert with safety",
        before: &["one"],
        action: &["revert", "VM", "one", "--safety-snapshot"],
        makes: None,
        ..PLAIN
    },
    Scenario {
        name: "commit running",
        before: &["one", "two"],
        action: &["commit", "VM", "one"],
        makes: None,
        drops: &["one", "two"],
        ..PLAIN
    },
    Scenario {
        name: "commit stopped",
        stopped: true,
        before: &["one"],
        making: &[],
        action: &["commit", "VM", "--all"],
        makes: None,
        drops: &["one"],
        ..PLAIN
    },
    Scenario {
        name: "cleanup",
        before: &["one", "two", "three"],
        action: &["cleanup", "VM", "two"],
        makes: None,
        drops: &["two"],
        ..PLAIN
    },
    Scenario {
        name: "resize",
        action: &["commit", "VM", "--resize-to", "96M", "--resize-disk", "vda"],
        makes: None,
        ..PLAIN
    },
];

/// What breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// The agent, right after this record.
    Record(u64),
    /// An effect, the so-manieth of its name.
    Effect(&'static str, String, usize),
}

impl Fault {
    pub(super) fn column(&self) -> &'static str {
        match self {
            Self::Record(_) => "agent killed",
            Self::Effect(how, ..) => how,
        }
    }

    pub(super) fn kills_libvirtd(&self) -> bool {
        self.column() == "libvirtd killed"
    }

    pub(super) fn place(&self) -> String {
        match self {
            Self::Record(number) => format!("record {number}"),
            Self::Effect(_, operation, nth) => format!("'{operation}' ({})", nth + 1),
        }
    }

    pub(super) fn variable(&self, libvirtd: Option<u32>) -> String {
        let (place, skip, value) = match self {
            Self::Record(number) => ("journal.record".to_owned(), number - 1, String::new()),
            Self::Effect(how, operation, nth) => {
                let value = match *how {
                    "fails before" => "before".to_owned(),
                    "fails after" => "after".to_owned(),
                    "lands late" => format!("late {LATE}"),
                    _ => format!("kill {} 5", libvirtd.unwrap_or_default()),
                };
                (
                    format!("effect.{}", operation.replace(' ', "_")),
                    *nth as u64,
                    value,
                )
            }
        };
        let before = if skip == 0 {
            String::new()
        } else {
            format!("{skip}*off->")
        };
        format!("{place}={before}1*return({value})->off")
    }
}

pub(super) const COLUMNS: [&str; 5] = [
    "agent killed",
    "fails before",
    "fails after",
    "lands late",
    "libvirtd killed",
];
