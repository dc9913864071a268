//! Machines of a network that is none: network namespaces with lines between them.
//!
//! Invariant: nothing of it is seen outside the namespaces, so that several labs
//! may have the same addresses at once; all of it goes when dropped.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;

use crate::command::{User, privileged, succeed};

/// A controller and machines that it has a line to each.
#[derive(Debug)]
pub struct Network {
    controller: Namespace,
    machines: Vec<Namespace>,
}

/// A network namespace.
#[derive(Debug)]
struct Namespace(String);

impl Namespace {
    fn new(what: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmsnap-{}-{number}-{what}", std::process::id());
        succeed(&mut privileged(["ip", "netns", "add", &name]))?;
        let namespace = Self(name);
        namespace.ip(["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    fn ip<const N: usize>(&self, words: [&str; N]) -> Result<()> {
        succeed(privileged(["ip", "-n", &self.0]).args(words))?;
        Ok(())
    }

    fn address(&self, line: &str, address: &str) -> Result<()> {
        // A fresh IPv6 address is used at once: nobody else could have it.
        let options: &[&str] = if address.contains(':') {
            &["nodad"]
        } else {
            &[]
        };
        let mut command = privileged(["ip", "-n", &self.0, "addr", "add", address, "dev", line]);
        succeed(command.args(options))?;
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its end of each line goes with it, and with that the other end.
        let _ = succeed(&mut privileged(["ip", "netns", "del", &self.0]));
    }
}

impl Network {
    /// A controller with a line to each of so many machines. The controller has
    /// the addresses 10.77.N.1 and fd77:N::1, the machine N (from 0 on) has
    /// 10.77.N.2, 10.77.N.22 and fd77:N::2.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(machines: u32) -> Result<Self> {
        let controller = Namespace::new("c")?;
        let machines = (0..machines)
            .map(|number| {
                let machine = Namespace::new("m")?;
                let (here, there) = (format!("line{number}"), "line".to_owned());
                controller.ip([
                    "link", "add", &here, "type", "veth", "peer", "name", &there, "netns",
                    &machine.0,
                ])?;
                for (namespace, line, end) in [(&controller, &here, "1"), (&machine, &there, "2")] {
                    namespace.address(line, &format!("10.77.{number}.{end}/24"))?;
                    namespace.address(line, &format!("fd77:{number}::{end}/64"))?;
                    namespace.ip(["link", "set", line, "up"])?;
                }
                machine.address(&there, &format!("10.77.{number}.22/24"))?;
                Ok(machine)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            controller,
            machines,
        })
    }

    /// A command that runs on the controller, as whoever runs this.
    #[must_use]
    pub fn on_controller(&self, command: &Command) -> Command {
        inside(&self.controller.0, User::current(), command)
    }

    /// Where the network of a machine is.
    #[must_use]
    pub fn machine(&self, number: usize) -> Place {
        Place(self.machines[number].0.clone())
    }
}

/// A machine of a network, as far as processes are put there.
#[derive(Debug, Clone)]
pub struct Place(String);

impl Place {
    /// A command that runs there as a user.
    #[must_use]
    pub fn holds(&self, user: User, command: &Command) -> Command {
        inside(&self.0, user, command)
    }
}

fn inside(namespace: &str, user: User, command: &Command) -> Command {
    let (uid, gid) = (user.uid.to_string(), user.gid.to_string());
    let network = format!("--net=/run/netns/{namespace}");
    let mut entering = privileged(["nsenter", &network, "-S", &uid, "-G", &gid, "--", "env"]);
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            let mut word = name.to_owned();
            word.push("=");
            word.push(value);
            entering.arg(word);
        }
    }
    entering.arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        entering.current_dir(folder);
    }
    entering
}
