//! Local ports for servers that are started later, or again and again.
//!
//! Invariant: none is of those that the kernel gives out by itself, where the host has
//! others. A port that was asked for as port 0 and let go belongs to the next
//! connection, of whomever, and then a guest that is started again cannot have it.

use std::{fs, net::TcpListener, ops::RangeInclusive};

use anyhow::{Context as _, Result};

/// Ports that are looked at before one that the kernel gives out is taken after all:
/// a host may have no others.
const QUIET: usize = 1_000;

/// A free port of 127.0.0.1.
///
/// # Errors
/// When none is found.
pub fn quiet_port() -> Result<u16> {
    let given_out = given_out().unwrap_or(32_768..=60_999);
    (0..2 * QUIET)
        .map(|attempt| (attempt, fastrand::u16(10_000..)))
        .filter(|(attempt, port)| *attempt >= QUIET || !given_out.contains(port))
        .map(|(_, port)| port)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .context("no port of 127.0.0.1 is free")
}

/// Ports that the kernel gives to connections and to those who ask for port 0.
fn given_out() -> Result<RangeInclusive<u16>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ends = text.split_whitespace().map(str::parse);
    let mut next = || ends.next().context("two ports")?.context("a port");
    Ok(next()?..=next()?)
}
