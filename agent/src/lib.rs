//! The vmsnap agent: a pure middle (`planning`) and a shell around it.
//!
//! `api` calls `workflows`, which uses `planning`, the engine and the `journal`;
//! `observe` and `perform` are the only ones that know both what is meant and
//! how libvirt does it. Never back.

pub mod api;
pub mod config;
pub mod daemon;
pub mod faults;
pub mod flow;
pub mod journal;
pub mod logs;
pub mod observe;
pub mod operate;
pub mod perform;
pub mod planning;
pub mod trust;
pub mod workflows;
