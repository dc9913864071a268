//! Trust as callers meet it: an agent of a test's own on libvirt's test driver,
//! which needs neither QEMU nor root, and certificates of every sort.

mod agent;
mod calls;
mod doors;
mod pki;
mod reload;
mod rights;
