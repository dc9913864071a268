//! Who is calling, from what the transport tells.

use tonic::{
    Extensions,
    transport::server::{TcpConnectInfo, UdsConnectInfo},
};

use crate::journal::Caller;

/// The caller of a request: a socket peer by uid, a TCP peer by address.
#[must_use]
pub fn of(extensions: &Extensions) -> Caller {
    if let Some(info) = extensions.get::<UdsConnectInfo>() {
        let uid = info.peer_cred.map(|peer| peer.uid());
        return Caller {
            identity: uid.map_or_else(|| "unknown".to_owned(), |uid| format!("uid:{uid}")),
            transport: "unix".into(),
            address: String::new(),
        };
    }
    let address = extensions
        .get::<TcpConnectInfo>()
        .and_then(TcpConnectInfo::remote_addr);
    Caller {
        identity: "loopback".into(),
        transport: "tcp".into(),
        address: address
            .map(|address| address.to_string())
            .unwrap_or_default(),
    }
}
