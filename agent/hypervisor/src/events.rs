//! libvirt's domain events as values.
//!
//! Invariants: callbacks only copy what they are given and send it on; they run
//! on libvirt's event loop and must not block or call back into libvirt.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::mpsc,
    time::Instant,
};

use tokio::sync::broadcast;
use virt::{connect::Connect, sys};

/// What happened to a domain's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// Defined.
    Defined,
    /// Undefined.
    Undefined,
    /// Started.
    Started,
    /// vCPUs stand still.
    Suspended,
    /// vCPUs run again.
    Resumed,
    /// Off.
    Stopped,
    /// On its way off.
    Shutdown,
    /// Suspended by the guest.
    PmSuspended,
    /// Crashed.
    Crashed,
}

/// What an event tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// A change in the domain's life, with libvirt's detail code.
    Lifecycle(Lifecycle, i32),
    /// A block job changed: disk, libvirt's status code (0 completed, 1 failed,
    /// 2 cancelled, 3 ready).
    BlockJob {
        /// Target of the disk.
        disk: String,
        /// libvirt's status.
        status: i32,
    },
    /// The guest agent connected or disconnected.
    Agent {
        /// Connected.
        connected: bool,
    },
    /// The guest was paused, or told, because of an I/O error.
    IoError {
        /// Path of the image.
        path: String,
        /// libvirt's reason, such as `enospc`.
        reason: String,
    },
}

/// An event of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainEvent {
    /// Name of the domain.
    pub domain: String,
    /// When it arrived.
    pub at: Instant,
    /// What happened.
    pub kind: EventKind,
}

impl DomainEvent {
    /// The change in the domain's life, if that is what it tells.
    #[must_use]
    pub fn lifecycle(&self) -> Option<Lifecycle> {
        match self.kind {
            EventKind::Lifecycle(change, _) => Some(change),
            _ => None,
        }
    }
}

type Sender = broadcast::Sender<DomainEvent>;

/// Registers for events and for the end of the connection, of which `closed` is
/// told.
pub(crate) fn register(connection: &Connect, events: &Sender, closed: mpsc::Sender<String>) {
    let any = |id: u32, callback: sys::virConnectDomainEventGenericCallback| {
        let opaque = Box::into_raw(Box::new(events.clone())).cast::<c_void>();
        // SAFETY: the connection is open; `callback` has the signature that
        // libvirt documents for `id`; `opaque` is a leaked box that libvirt
        // gives back to `free_sender` exactly once.
        let registered = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                std::ptr::null_mut(),
                id as c_int,
                callback,
                opaque,
                Some(free_sender),
            )
        };
        if registered < 0 {
            tracing::debug!(id, "this driver does not send these events");
            // SAFETY: libvirt did not take the box.
            unsafe { free_sender(opaque) };
        }
    };
    // SAFETY: all four: libvirt casts every callback to the generic type and
    // calls it with the signature that belongs to the id.
    unsafe {
        any(
            sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            Some(std::mem::transmute::<
                *const (),
                unsafe extern "C" fn(_, _, _),
            >(on_lifecycle as *const ())),
        );
        any(
            sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
            Some(std::mem::transmute::<
                *const (),
                unsafe extern "C" fn(_, _, _),
            >(on_block_job as *const ())),
        );
        any(
            sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
            Some(std::mem::transmute::<
                *const (),
                unsafe extern "C" fn(_, _, _),
            >(on_agent as *const ())),
        );
        any(
            sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
            Some(std::mem::transmute::<
                *const (),
                unsafe extern "C" fn(_, _, _),
            >(on_io_error as *const ())),
        );
    }
    let opaque = Box::into_raw(Box::new(closed)).cast::<c_void>();
    // SAFETY: as above; `opaque` goes back to `free_closed` exactly once.
    let registered = unsafe {
        sys::virConnectRegisterCloseCallback(
            connection.as_ptr(),
            Some(on_close),
            opaque,
            Some(free_closed),
        )
    };
    if registered < 0 {
        // The sender must live as long as the connection, or its end would be
        // taken for the connection's: the test driver has no wire that closes.
        tracing::debug!("this driver does not tell when it closes");
    }
}

unsafe extern "C" fn free_sender(opaque: *mut c_void) {
    // SAFETY: made by `register` from a box of this type.
    drop(unsafe { Box::from_raw(opaque.cast::<Sender>()) });
}

unsafe extern "C" fn free_closed(opaque: *mut c_void) {
    // SAFETY: made by `register` from a box of this type.
    drop(unsafe { Box::from_raw(opaque.cast::<mpsc::Sender<String>>()) });
}

unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: libvirt's strings end with NUL and live for the callback.
    unsafe { CStr::from_ptr(pointer) }
        .to_string_lossy()
        .into_owned()
}

unsafe fn send(domain: sys::virDomainPtr, opaque: *mut c_void, kind: EventKind) {
    // SAFETY: the domain lives for the callback; its name needs no round trip.
    let name = unsafe { text(sys::virDomainGetName(domain)) };
    // SAFETY: made by `register` from a box of this type, freed after the last
    // callback.
    let events = unsafe { &*opaque.cast::<Sender>() };
    // Nobody has to listen.
    let _ = events.send(DomainEvent {
        domain: name,
        at: Instant::now(),
        kind,
    });
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) {
    let change = match u32::try_from(event) {
        Ok(sys::VIR_DOMAIN_EVENT_DEFINED) => Lifecycle::Defined,
        Ok(sys::VIR_DOMAIN_EVENT_UNDEFINED) => Lifecycle::Undefined,
        Ok(sys::VIR_DOMAIN_EVENT_STARTED) => Lifecycle::Started,
        Ok(sys::VIR_DOMAIN_EVENT_SUSPENDED) => Lifecycle::Suspended,
        Ok(sys::VIR_DOMAIN_EVENT_RESUMED) => Lifecycle::Resumed,
        Ok(sys::VIR_DOMAIN_EVENT_STOPPED) => Lifecycle::Stopped,
        Ok(sys::VIR_DOMAIN_EVENT_SHUTDOWN) => Lifecycle::Shutdown,
        Ok(sys::VIR_DOMAIN_EVENT_PMSUSPENDED) => Lifecycle::PmSuspended,
        Ok(sys::VIR_DOMAIN_EVENT_CRASHED) => Lifecycle::Crashed,
        _ => return,
    };
    // SAFETY: the arguments are libvirt's own.
    unsafe { send(domain, opaque, EventKind::Lifecycle(change, detail)) };
}

unsafe extern "C" fn on_block_job(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: the arguments are libvirt's own.
    unsafe {
        let disk = text(disk);
        send(domain, opaque, EventKind::BlockJob { disk, status });
    }
}

unsafe extern "C" fn on_agent(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    let connected =
        u32::try_from(state) == Ok(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED);
    // SAFETY: the arguments are libvirt's own.
    unsafe { send(domain, opaque, EventKind::Agent { connected }) };
}

unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    path: *const c_char,
    _alias: *const c_char,
    _action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: the arguments are libvirt's own.
    unsafe {
        let (path, reason) = (text(path), text(reason));
        send(domain, opaque, EventKind::IoError { path, reason });
    }
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    let why = match u32::try_from(reason) {
        Ok(sys::VIR_CONNECT_CLOSE_REASON_EOF) => "libvirt closed the connection",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => "libvirt no longer answers",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_CLIENT) => "the connection was closed here",
        _ => "the connection broke",
    };
    // SAFETY: made by `register` from a box of this type, freed after the last
    // callback.
    let closed = unsafe { &*opaque.cast::<mpsc::Sender<String>>() };
    // The keeper may be gone.
    let _ = closed.send(why.to_owned());
}
