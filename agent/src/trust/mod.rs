//! Who may do what: peers, roles, rights, limits, and the trail of what was done.
//!
//! The way of a call: `incoming` makes a connection and says whose it is
//! ([`Peer`]); [`Gate`], a layer that every call passes, holds the peer against
//! the [`Roles`] and gives the call its [`Access`]; the handlers ask that for each
//! VM and action. What each RPC and action needs stands in one table, [`rights`].
//!
//! Invariants
//! - Nothing is allowed that no table allows: a peer without a role is turned away
//!   at the gate, whatever it asks for (health and reflection excepted).
//! - What a caller may not see is answered like what is not there.
//! - An open stream ends with its caller's right to it.
//! - Certificates, keys, trust roots and roles are read anew while the agent runs;
//!   what cannot be used never replaces what can.

mod access;
mod audit;
mod gate;
mod incoming;
mod limits;
mod measured;
mod peer;
mod reload;
pub mod rights;
mod roles;
mod tenure;
mod tls;

pub use access::{Access, Sight};
pub use audit::{Auditor, Did};
pub use gate::{Gate, GateLayer};
pub use incoming::{Connection, Door, Listener};
pub use limits::{Most, Places, Turns};
pub use measured::MESSAGE_MOST;
pub use peer::Peer;
pub use reload::{Of, Reloads, Report, SOON, Trust};
pub use rights::{Deed, Role};
pub use roles::{Roles, host_groups};
pub use tenure::{Over, Tenure};
pub use tls::Paths as TlsPaths;
