//! Connections: taken from a listener, with TLS made on them, and given on with
//! who is at the other end.
//!
//! Invariants: a handshake that is slow, or never ends, holds up no other; its
//! time, and how many there are, of one address and in all, are bounded; one that
//! fails is denied with the address and the reason, and the other side gets to read
//! the reason; a listener never ends because of one connection. Each listener has
//! places of its own: whoever crowds one of them, which over the network takes no
//! certificate, keeps nobody out of another.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::{
    audit::{Auditor, Denied},
    peer::Peer,
    reload::Trust,
};
use crate::journal::Caller;

/// How long a handshake may take, waiting for its turn included.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes that go on at once.
const HANDSHAKES: usize = 128;
/// Those of one address among them.
const HANDSHAKES_OF_ONE: usize = 64;
/// Connections of one address that wait for their handshake or are in it.
const WAITING_OF_ONE: usize = 1_024;
/// How long the other side gets to read why its handshake failed.
const LINGER: Duration = Duration::from_secs(1);
/// How often it is told that connections are turned away.
const TELL: Duration = Duration::from_secs(5);
/// How long to wait when the system gives no more connections.
const PAUSE: Duration = Duration::from_millis(100);

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// The Unix socket.
    Unix(UnixListener),
    /// Plain TCP on loopback.
    Plain(TcpListener),
    /// TCP with mutual TLS.
    Tls(TcpListener),
}

#[derive(Debug)]
enum Io {
    Unix(UnixStream),
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection, and who is at its other end.
#[derive(Debug)]
pub struct Connection {
    io: Io,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

macro_rules! each {
    ($self:ident, $io:ident => $what:expr) => {
        match &mut $self.get_mut().io {
            Io::Unix($io) => $what,
            Io::Plain($io) => $what,
            Io::Tls($io) => $what,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, io => Pin::new(io).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, io => Pin::new(io).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Unix(io) => io.is_write_vectored(),
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}

/// What the connections of all listeners share; cheap to clone.
#[derive(Debug, Clone)]
pub struct Door {
    trust: Arc<Trust>,
    auditor: Auditor,
    most: usize,
    handshakes: Arc<Semaphore>,
    addresses: Addresses,
    turned_away: Arc<Mutex<(u64, Option<Instant>)>>,
}

impl Door {
    /// For at most so many connections at once of each listener.
    #[must_use]
    pub fn new(trust: Arc<Trust>, auditor: Auditor, most: usize) -> Self {
        Self {
            trust,
            auditor,
            most: most.min(Semaphore::MAX_PERMITS),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            addresses: Addresses::default(),
            turned_away: Arc::default(),
        }
    }

    /// The connections of a listener. Has to be called inside the runtime that
    /// they shall be served by.
    #[must_use]
    pub fn open(&self, listener: Listener) -> ReceiverStream<io::Result<Connection>> {
        let (give, taken) = mpsc::channel(16);
        tokio::spawn(accept(listener, self.clone(), give));
        ReceiverStream::new(taken)
    }
}

type Give = mpsc::Sender<io::Result<Connection>>;

async fn accept(listener: Listener, door: Door, give: Give) {
    let places = Arc::new(Semaphore::new(door.most));
    loop {
        let accepted = async {
            match &listener {
                Listener::Unix(listener) => {
                    let (stream, _) = listener.accept().await?;
                    Ok((Raw::Unix(stream), None))
                }
                Listener::Plain(listener) => {
                    let (stream, address) = listener.accept().await?;
                    Ok((Raw::Plain(stream, address), Some(address)))
                }
                Listener::Tls(listener) => {
                    let (stream, address) = listener.accept().await?;
                    Ok((Raw::Tls(stream, address), Some(address)))
                }
            }
        };
        let accepted: io::Result<_> = tokio::select! {
            accepted = accepted => accepted,
            () = give.closed() => return,
        };
        let (raw, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a caller who is gone already.
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            door.turn_away(address);
            continue;
        };
        match raw {
            Raw::Unix(stream) => {
                let peer = socket_peer(&stream);
                let connection = Connection {
                    io: Io::Unix(stream),
                    peer,
                    _place: place,
                };
                if give.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
            Raw::Plain(stream, address) => {
                let _ = stream.set_nodelay(true);
                let connection = Connection {
                    io: Io::Plain(stream),
                    peer: Peer::Loopback { address },
                    _place: place,
                };
                if give.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
            Raw::Tls(stream, address) => {
                let Some(waiting) = door.addresses.enter(address.ip()) else {
                    door.turn_away(Some(address));
                    continue;
                };
                let (door, give) = (door.clone(), give.clone());
                tokio::spawn(async move {
                    if let Some(connection) = door.shake(stream, address, place, waiting).await {
                        // A server that is gone needs no connection.
                        let _ = give.send(Ok(connection)).await;
                    }
                });
            }
        }
    }
}

enum Raw {
    Unix(UnixStream),
    Plain(TcpStream, SocketAddr),
    Tls(TcpStream, SocketAddr),
}

fn socket_peer(stream: &UnixStream) -> Peer {
    let credentials = stream.peer_cred().ok();
    let mut groups = vmsnap_hypervisor::peer_groups(stream.as_fd()).unwrap_or_default();
    groups.extend(credentials.map(|peer| peer.gid()));
    Peer::Socket {
        uid: credentials.map(|peer| peer.uid()),
        groups: groups.into(),
    }
}

impl Door {
    async fn shake(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
        waiting: Waiting,
    ) -> Option<Connection> {
        let _ = stream.set_nodelay(true);
        let config = self.trust.server_config()?;
        let shaking = async {
            let of_one = waiting.turn().acquire_owned().await.ok()?;
            let of_all = self.handshakes.clone().acquire_owned().await.ok()?;
            let accepted = TlsAcceptor::from(config)
                .accept(stream)
                .into_fallible()
                .await;
            drop((of_one, of_all));
            Some(accepted)
        };
        let problem = match tokio::time::timeout(HANDSHAKE, shaking).await {
            Ok(None) => return None,
            Ok(Some(Ok(stream))) => {
                let named = match stream.get_ref().1.peer_certificates() {
                    Some([first, ..]) => Peer::by_certificate(address, first),
                    _ => Err("no client certificate was shown".to_owned()),
                };
                match named {
                    Ok(peer) => {
                        return Some(Connection {
                            io: Io::Tls(Box::new(stream)),
                            peer,
                            _place: place,
                        });
                    }
                    Err(problem) => problem,
                }
            }
            Ok(Some(Err((error, stream)))) => {
                // Closed at once with bytes unread, the connection would be reset, and the
                // alert that says why with it.
                tokio::spawn(linger(stream));
                reason(&error)
            }
            Err(_) => format!("it took longer than {} s", HANDSHAKE.as_secs()),
        };
        let caller = Caller {
            identity: "unknown".into(),
            transport: "tls".into(),
            address: address.to_string(),
        };
        self.auditor.denied(
            &caller,
            Denied {
                method: "TLS handshake",
                action: "",
                vm: "",
                reason: "NOT_TRUSTED",
                note: &problem,
            },
        );
        None
    }

    /// Counts a connection that is dropped, and tells of it now and then.
    fn turn_away(&self, address: Option<SocketAddr>) {
        let mut told = self
            .turned_away
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        told.0 += 1;
        if told.1.is_none_or(|at| at.elapsed() > TELL) {
            let address = address.map_or_else(|| "the socket".to_owned(), |it| it.to_string());
            tracing::warn!(
                connections = told.0,
                last = %address,
                "connections were turned away: too many are open (limits.max_connections)"
            );
            *told = (0, Some(Instant::now()));
        }
    }
}

/// Why a handshake failed, for whoever keeps the agent.
fn reason(error: &io::Error) -> String {
    use tokio_rustls::rustls::{CertificateError as Bad, Error};

    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>())
    else {
        return error.to_string();
    };
    match tls {
        Error::NoCertificatesPresented => "no client certificate was shown".into(),
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            format!("the client certificate has expired ({tls})")
        }
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "no CA in tls.client_ca signed the client certificate".into()
        }
        Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            format!("the client certificate is not valid yet ({tls})")
        }
        Error::AlertReceived(_) => format!("the caller refused the agent's certificate ({tls})"),
        Error::InvalidMessage(_) => "what was sent is no TLS".into(),
        other => other.to_string(),
    }
}

async fn linger(mut stream: TcpStream) {
    let rest = async {
        stream.shutdown().await?;
        let mut bytes = [0; 1_024];
        while stream.read(&mut bytes).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // However it ends, the connection is over.
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// Who waits for a handshake, by address.
#[derive(Debug, Clone, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, OfOne>>>);

/// How many connections of an address wait, and whose turn it is among them.
type OfOne = (usize, Arc<Semaphore>);

/// A connection that waits for its handshake, or is in it.
struct Waiting {
    addresses: Addresses,
    address: IpAddr,
    turn: Arc<Semaphore>,
}

impl Addresses {
    fn enter(&self, address: IpAddr) -> Option<Waiting> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (waiting, turn) = all
            .entry(address)
            .or_insert_with(|| (0, Arc::new(Semaphore::new(HANDSHAKES_OF_ONE))));
        if *waiting >= WAITING_OF_ONE {
            return None;
        }
        *waiting += 1;
        Some(Waiting {
            addresses: self.clone(),
            address,
            turn: turn.clone(),
        })
    }
}

impl Waiting {
    fn turn(&self) -> Arc<Semaphore> {
        self.turn.clone()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut all = self
            .addresses
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((waiting, _)) = all.get_mut(&self.address) {
            *waiting -= 1;
            if *waiting == 0 {
                all.remove(&self.address);
            }
        }
    }
}
