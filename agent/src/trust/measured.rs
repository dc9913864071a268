//! What a call sends, measured before it is kept.
//!
//! Each message of a call comes with its length in front: a byte that says whether
//! it is compressed, and four with the length, the highest first (gRPC over HTTP/2,
//! *Length-Prefixed-Message*).
//!
//! Invariant: of a message that is larger than what is taken nothing but its length
//! is kept, and the call ends with an error that names size and limit.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{
    body::Body,
    codegen::{Bytes, StdError},
};

use super::gate::Told;
use crate::planning::{Fault, Reason};

/// The largest message that is taken, in bytes.
pub const MESSAGE_MOST: u32 = 256 * 1024;
/// Bytes in front of each message.
const FRONT: usize = 5;

/// Where in the messages of a call its bytes have come to.
#[derive(Debug, Default)]
struct Measure {
    /// What came of the bytes in front of the next message.
    front: [u8; FRONT],
    /// How many of them.
    known: usize,
    /// Bytes of this message that are still to come.
    left: usize,
}

impl Measure {
    /// Goes on by some bytes.
    ///
    /// # Errors
    /// The length of a message that is too large.
    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), u32> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let of_this = self.left.min(bytes.len());
                self.left -= of_this;
                bytes = &bytes[of_this..];
                continue;
            }
            let of_front = (FRONT - self.known).min(bytes.len());
            self.front[self.known..][..of_front].copy_from_slice(&bytes[..of_front]);
            self.known += of_front;
            bytes = &bytes[of_front..];
            if self.known == FRONT {
                let [_, a, b, c, d] = self.front;
                let length = u32::from_be_bytes([a, b, c, d]);
                if length > MESSAGE_MOST {
                    return Err(length);
                }
                (self.known, self.left) = (0, length as usize);
            }
        }
        Ok(())
    }
}

/// What a call sends.
#[derive(Debug)]
pub(super) struct Measured {
    body: Body,
    measure: Measure,
    told: Told,
}

impl Measured {
    pub(super) fn new(body: Body, told: Told) -> Self {
        Self {
            body,
            measure: Measure::default(),
            told,
        }
    }
}

impl HttpBody for Measured {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        let frame = match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other.map(|frame| frame.map_err(Into::into))),
        };
        let passed = frame
            .data_ref()
            .map_or(Ok(()), |bytes| self.measure.pass(bytes));
        Poll::Ready(Some(match passed {
            Ok(()) => Ok(frame),
            Err(length) => Err((self.told)(&too_large(length)).into()),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn too_large(length: u32) -> Fault {
    Fault::new(
        Reason::RequestTooLarge,
        format!("the request has {length} bytes, and {MESSAGE_MOST} are taken at most"),
    )
    .with("size_bytes", length)
    .with("most_bytes", MESSAGE_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(length.to_be_bytes());
        bytes.resize(FRONT + length as usize, b'x');
        bytes
    }

    #[test]
    fn messages_are_told_apart_however_they_are_cut_into_pieces() {
        let fine: Vec<u8> = [0, 1, 7, MESSAGE_MOST].map(message).concat();
        let mut both = fine.clone();
        both.extend(&message(MESSAGE_MOST + 1)[..FRONT]);
        for piece in [1, 2, 5, 6, 4_096, usize::MAX] {
            let pass = |bytes: &[u8]| {
                let mut measure = Measure::default();
                let mut pieces = bytes.chunks(piece);
                pieces.try_for_each(|bytes| measure.pass(bytes))
            };
            assert_eq!(pass(&fine), Ok(()), "{piece}");
            assert_eq!(pass(&both), Err(MESSAGE_MOST + 1), "{piece}");
            assert_eq!(pass(&both[..both.len() - 1]), Ok(()), "{piece}");
        }
    }
}
