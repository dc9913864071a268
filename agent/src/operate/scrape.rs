//! Where Prometheus reads metrics: HTTP/1.1, `GET /metrics`, on loopback or
//! wherever the configuration says, or on a Unix socket.
//!
//! Invariants: reads only; a caller that is slow or never ends is cut off, and
//! many at once wait for a place; a scrape is answered whatever libvirt does.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use super::{activation, metrics, readings::Readings};
use crate::{
    api::{group_id_of, open_socket},
    config::{Config, MetricsAddress},
    workflows::Workflows,
};

/// How long one connection may last.
const LIMIT: Duration = Duration::from_secs(30);
/// Connections at once.
const AT_ONCE: usize = 8;
/// What has gathered is put into its buckets that often, scraped or not.
const UPKEEP: Duration = Duration::from_secs(60);

/// The open endpoint.
#[derive(Debug)]
pub enum Endpoint {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

impl Endpoint {
    /// Opens what was handed over, or else what the configuration names.
    ///
    /// # Errors
    /// A sentence that names the address and the reason.
    pub async fn open(
        config: &Config,
        handed: Option<activation::Metrics>,
    ) -> Result<Option<Self>, String> {
        let wrong =
            |error: std::io::Error| format!("metrics.listen '{}': {error}", config.metrics.listen);
        if let Some(handed) = handed {
            return match handed {
                activation::Metrics::Unix(socket) => socket
                    .set_nonblocking(true)
                    .and_then(|()| UnixListener::from_std(socket))
                    .map(Self::Unix),
                activation::Metrics::Tcp(socket) => socket
                    .set_nonblocking(true)
                    .and_then(|()| TcpListener::from_std(socket))
                    .map(Self::Tcp),
            }
            .map(Some)
            .map_err(wrong);
        }
        match config.metrics_address() {
            None => Ok(None),
            Some(MetricsAddress::Tcp(address)) => {
                let listener = TcpListener::bind(address).await.map_err(wrong)?;
                Ok(Some(Self::Tcp(listener)))
            }
            Some(MetricsAddress::Unix(path)) => {
                let group = group_id_of(&config.listen.socket_group).map_err(wrong)?;
                let mode = config.socket_mode().unwrap_or(0o660);
                let listener = open_socket(&path, group, mode).await.map_err(wrong)?;
                Ok(Some(Self::Unix(listener)))
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|error| error.to_string(), |address| address.to_string()),
            Self::Unix(listener) => listener
                .local_addr()
                .ok()
                .and_then(|address| Some(address.as_pathname()?.display().to_string()))
                .unwrap_or_default(),
        }
    }

    /// Answers scrapes for ever.
    pub async fn serve(self, workflows: Workflows, handle: PrometheusHandle) {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let scraped = Scraped {
            readings: Readings::new(workflows.observer().clone()),
            workflows,
            handle: handle.clone(),
        };
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP).await;
                handle.run_upkeep();
            }
        });
        loop {
            // Never closed.
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let scraped = scraped.clone();
            let accepted = match &self {
                Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move {
                        scraped.answer(stream).await;
                        drop(place);
                    });
                }),
                Self::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move {
                        scraped.answer(stream).await;
                        drop(place);
                    });
                }),
            };
            if let Err(error) = accepted {
                // Out of file descriptors, mostly: it passes.
                tracing::warn!(%error, "a scrape could not be accepted");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Scraped {
    readings: Readings,
    workflows: Workflows,
    handle: PrometheusHandle,
}

impl Scraped {
    async fn answer(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(|request: Request<Incoming>| {
            let scraped = self.clone();
            async move { Ok::<_, Infallible>(scraped.response(&request).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match tokio::time::timeout(LIMIT, serving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a scrape was not finished"),
            Err(_) => tracing::debug!("a scrape took too long and was cut off"),
        }
    }

    async fn response(&self, request: &Request<Incoming>) -> Response<String> {
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
        }
        let (standing, known) = tokio::join!(self.workflows.standing(), self.readings.known());
        metrics::set(&standing, &known, self.workflows.config());
        let text = self.handle.render();
        let mut response = plain(StatusCode::OK, text);
        response.headers_mut().insert(
            hyper::header::CONTENT_TYPE,
            hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
        );
        response
    }
}

fn plain(status: StatusCode, text: impl Into<String>) -> Response<String> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response
}
