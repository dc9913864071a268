//! The layer that every call passes, whatever the service.
//!
//! Invariants: no handler is reached without an [`Access`] in its request; a call
//! holds its place until its answer was sent to the end, or given up; what is open to
//! all has places apart, so that nobody without a role takes one from who has one; no
//! message that is too large is kept, and no stream goes on without a right to it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http_body::{Body as HttpBody, Frame};
use jiff::Timestamp;
use tonic::{
    Status,
    body::Body,
    codegen::{Bytes, http},
};
use tower::{Layer, Service};

use super::{
    access::Access,
    audit::Auditor,
    limits::{Place, Places, Turns},
    measured::Measured,
    peer::Peer,
    reload::Trust,
    rights::{self, Right},
    tenure::{Over, Tenure},
};
use crate::planning::{Fault, Reason};

/// What a fault is sent as.
pub(super) type Told = fn(&Fault) -> Status;

#[derive(Debug)]
struct Inner {
    trust: Arc<Trust>,
    auditor: Auditor,
    calls: Places,
    streams: Places,
    open: Places,
    turns: Turns,
    told: Told,
}

/// What a call has that came in.
struct Entered {
    access: Access,
    place: Place,
    /// The peer, when the call has to take its turn.
    turn: Option<String>,
    /// The right to the stream, when the call answers with one.
    tenure: Option<Tenure>,
}

/// Decides who comes in; cheap to clone.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Inner>);

impl Gate {
    /// With the places that there are for calls, for streams, and for both of what is
    /// open to all.
    #[must_use]
    pub fn new(
        trust: Arc<Trust>,
        auditor: Auditor,
        calls: Places,
        streams: Places,
        open: Places,
        turns: Turns,
        told: Told,
    ) -> Self {
        Self(Arc::new(Inner {
            trust,
            auditor,
            calls,
            streams,
            open,
            turns,
            told,
        }))
    }

    /// As a layer of a server.
    #[must_use]
    pub fn layer(&self) -> GateLayer {
        GateLayer(self.clone())
    }

    fn enter(&self, peer: Option<&Peer>, path: &str) -> Result<Entered, Fault> {
        let Some(peer) = peer else {
            return Err(Fault::new(
                Reason::Internal,
                "the connection does not tell who is at its other end",
            ));
        };
        let Inner {
            trust,
            auditor,
            calls,
            streams,
            open,
            ..
        } = &*self.0;
        let right = rights::of_path(path);
        let is_stream = right.is_some_and(|right| right.streams) || path.ends_with("/Watch");
        // Made first: roles that change from here on are held against it.
        let tenure = Tenure::new(trust.clone(), auditor.clone(), peer.clone(), right);
        let access = tenure.access();
        let caller = access.caller();
        let places = match right {
            None => open,
            Some(right) if right.streams => streams,
            Some(_) => calls,
        };
        let peer_key = caller.key();
        let place = places.take(&peer_key)?;
        if peer.has_expired(Timestamp::now()) {
            return Err(access.expired(right.map_or(path, |right| right.method)));
        }
        match right {
            Some(right) => access.may_try(right)?,
            None if rights::is_open(path) => {}
            // What is not there is told to those who may ask for something.
            None if access.highest().is_none() => return Err(access.stranger(path)),
            None => {}
        }
        Ok(Entered {
            access,
            place,
            turn: right.is_some_and(Right::reads).then_some(peer_key),
            tenure: is_stream.then_some(tenure),
        })
    }
}

/// [`Gate`] as a layer.
#[derive(Debug, Clone)]
pub struct GateLayer(Gate);

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated {
            gate: self.0.clone(),
            inner,
        }
    }
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S, R> Service<http::Request<Body>> for Gated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<tonic::codegen::StdError>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future =
        Pin<Box<dyn Future<Output = Result<http::Response<Body>, S::Error>> + Send + 'static>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let (peer, told) = (request.extensions().get::<Peer>(), self.gate.0.told);
        match self.gate.enter(peer, request.uri().path()) {
            Err(fault) => Box::pin(std::future::ready(Ok(told(&fault).into_http()))),
            Ok(Entered {
                access,
                place,
                turn,
                tenure,
            }) => {
                request.extensions_mut().insert(access);
                if let Some(tenure) = tenure.clone() {
                    request.extensions_mut().insert(tenure);
                }
                let request = request.map(|body| Body::new(Measured::new(body, told)));
                let turns = self.gate.0.turns.clone();
                // What is called is made now, and does nothing before its turn.
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let _turn = match &turn {
                        Some(peer) => Some(turns.take(peer).await),
                        None => None,
                    };
                    let answer = answer.await?;
                    let over = answer.extensions().get::<Over>().cloned();
                    Ok(answer.map(|body| {
                        Body::new(Held {
                            body: Some(Box::pin(body)),
                            end: tenure.map(|tenure| Box::pin(tenure.ended(over)) as End),
                            told,
                            _place: place,
                        })
                    }))
                })
            }
        }
    }
}

/// Why a stream ends before its own end.
type End = Pin<Box<dyn Future<Output = Fault> + Send>>;

/// An answer that holds its call's place, and ends with the right to it.
struct Held<B> {
    /// None once the right to it has ended.
    body: Option<Pin<Box<B>>>,
    end: Option<End>,
    told: Told,
    _place: Place,
}

impl<B: HttpBody> HttpBody for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let held = &mut *self;
        let Some(body) = &mut held.body else {
            return Poll::Ready(None);
        };
        if let Some(end) = &mut held.end
            && let Poll::Ready(fault) = end.as_mut().poll(cx)
        {
            (held.body, held.end) = (None, None);
            let mut trailers = http::HeaderMap::new();
            // What cannot be written as a header is left out; the code never is.
            let _ = (held.told)(&fault).add_header(&mut trailers);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        body.as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        let body = self.body.as_ref();
        body.is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let body = self.body.as_ref();
        body.map_or_else(http_body::SizeHint::default, |body| body.size_hint())
    }
}
