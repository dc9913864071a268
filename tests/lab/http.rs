//! Asking over HTTP/1.1, as a monitoring system does.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Status and body of a request without a body of its own.
///
/// # Errors
/// When nobody answers in time, or not in HTTP.
pub fn request(method: &str, address: &str, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of headers")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    if head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked")
    {
        return Ok((status, unchunked(body)));
    }
    Ok((status, body.to_owned()))
}

/// Body of a request that has to succeed.
///
/// # Errors
/// As [`request`], and when the status is not 200.
pub fn get(address: &str, path: &str) -> Result<String> {
    let (status, body) = request("GET", address, path)?;
    ensure!(status == 200, "{path} answers {status}: {body}");
    Ok(body)
}

fn unchunked(body: &str) -> String {
    let mut rest = body;
    let mut whole = String::new();
    while let Some((length, more)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).unwrap_or(0);
        let Some(chunk) = more.get(..length).filter(|_| length > 0) else {
            break;
        };
        whole.push_str(chunk);
        rest = more[length..].trim_start_matches("\r\n");
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_in_pieces_becomes_one() {
        assert_eq!(unchunked("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), "abcde");
    }
}
