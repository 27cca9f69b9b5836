//! How messages become bytes and back: prost, with buffers of the size that a message needs.
//!
//! tonic's own codec gives each call 16 KiB of buffers at once. A manager holds a stream of each
//! agent, on which hardly anything larger than a heartbeat passes most of the time.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Bytes that a buffer begins with, and grows by while it is read.
const BUFFER: usize = 512;
/// Encoded bytes after which messages that are ready are handed on; tonic's default.
const YIELD_AT: usize = 32 << 10;

/// Encodes `T`, decodes `U`. The generated clients and servers use it.
#[derive(Clone, Copy, Debug)]
pub struct LeanCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for LeanCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for LeanCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Lean<T>;
    type Decoder = Lean<U>;

    fn encoder(&mut self) -> Self::Encoder {
        Lean(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        Lean(PhantomData)
    }
}

/// Encodes or decodes one kind of message.
#[derive(Clone, Copy, Debug)]
pub struct Lean<T>(PhantomData<T>);

impl<T: Message> Encoder for Lean<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // Once, instead of doubling on the way.
        buf.reserve(item.encoded_len());
        item.encode(buf)
            .map_err(|error| Status::internal(format!("a message could not be encoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER, YIELD_AT)
    }
}

impl<T: Message + Default> Decoder for Lean<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        let message = T::decode(buf);
        message
            .map(Some)
            .map_err(|error| Status::internal(format!("a message could not be decoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER, YIELD_AT)
    }
}
