//! Carries the VMM's device state between the unix socket that the VMM writes
//! to or reads from, and the control stream to the other agent. The VMM's
//! return path goes the other way at the same time.

use std::io;

use bytes::BytesMut;
use ramferry_proto::v1::DeviceState;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Most device state that one message carries; a longer one is not our peer's.
pub(crate) const MESSAGE_BYTES: usize = 256 * 1024;
/// Messages that wait for the VMM, or for the other agent.
const QUEUE: usize = 64;

/// Where device state that the other agent sends is put.
pub(crate) type Incoming = mpsc::Sender<DeviceState>;

/// The queue between the control stream and [`relay`].
pub(crate) fn queue() -> (Incoming, mpsc::Receiver<DeviceState>) {
    mpsc::channel(QUEUE)
}

/// Why a relay broke off.
#[derive(Debug, Error)]
pub(crate) enum RelayError {
    /// The other agent is lost; whoever reads its control stream says so.
    #[error("the other agent is lost")]
    Peer,
    /// The VMM closed its end, or never opened it.
    #[error("the VMM's end of the device state's stream broke: {0}")]
    Vmm(#[from] io::Error),
}

/// Relays until both directions have ended, or one has failed. `send` hands a
/// message to the other agent; it says `false` when that is lost. Afterwards
/// nothing more is taken from `incoming`.
pub(crate) async fn relay<S, F>(
    vmm: UnixStream,
    incoming: &mut mpsc::Receiver<DeviceState>,
    send: S,
) -> Result<(), RelayError>
where
    S: Fn(DeviceState) -> F,
    F: Future<Output = bool>,
{
    let result = relay_both(vmm, incoming, send).await;
    incoming.close();
    while incoming.try_recv().is_ok() {}
    result
}

async fn relay_both<S, F>(
    vmm: UnixStream,
    incoming: &mut mpsc::Receiver<DeviceState>,
    send: S,
) -> Result<(), RelayError>
where
    S: Fn(DeviceState) -> F,
    F: Future<Output = bool>,
{
    let (mut from_vmm, mut to_vmm) = vmm.into_split();
    // A VMM that cannot write holds its own lock, and hears nothing: it is read from while `send` waits.
    let (taken, mut outgoing) = mpsc::channel(QUEUE);
    let taking = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(MESSAGE_BYTES);
            // A buffer may have room for more than was reserved.
            let read = (&mut from_vmm).take(MESSAGE_BYTES as u64).read_buf(&mut buffer).await?;
            let message = DeviceState { data: buffer.split().freeze(), end: read == 0 };
            if taken.send(message).await.is_err() || read == 0 {
                return Ok(());
            }
        }
    };
    let outward = async {
        while let Some(message) = outgoing.recv().await {
            if !send(message).await {
                return Err(RelayError::Peer);
            }
        }
        Ok(())
    };
    let inward = async {
        while let Some(DeviceState { data, end }) = incoming.recv().await {
            to_vmm.write_all(&data).await?;
            if end {
                break;
            }
        }
        to_vmm.shutdown().await
    };
    // The VMM closes its end once it has all it needs; what still comes for it
    // then is of no use to it.
    let inward = async {
        inward
            .await
            .or_else(|error: io::Error| if is_closed(&error) { Ok(()) } else { Err(RelayError::Vmm(error)) })
    };
    tokio::try_join!(taking, outward, inward).map(|((), (), ())| ())
}

/// Whether the other end of `stream` is process `vmm`: whoever else reaches the
/// socket must not be given device state, nor give any.
pub(crate) fn check_vmm(stream: &UnixStream, vmm: u32) -> io::Result<()> {
    let other = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok());
    if other == Some(vmm) {
        return Ok(());
    }
    let other = other.map_or("a process out of sight".to_owned(), |pid| format!("process {pid}"));
    Err(io::Error::other(format!("the device state's socket is {other}'s, not the VMM's (process {vmm})")))
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn both_directions_are_carried_to_their_ends() {
        let (vmm, ours) = UnixStream::pair().unwrap();
        let (incoming, mut queue) = queue();
        let (sent, mut carried) = mpsc::unbounded_channel();
        let relaying = tokio::spawn(async move {
            relay(ours, &mut queue, |message| std::future::ready(sent.send(message).is_ok())).await
        });
        let (mut read, mut write) = vmm.into_split();
        write.write_all(b"state").await.unwrap();
        drop(write);
        incoming.send(DeviceState { data: Bytes::from_static(b"path"), end: false }).await.unwrap();
        incoming.send(DeviceState { data: Bytes::new(), end: true }).await.unwrap();
        let mut back = Vec::new();
        read.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"path");
        relaying.await.unwrap().unwrap();
        let mut data = Vec::new();
        let mut ended = false;
        while let Some(message) = carried.recv().await {
            assert!(!ended);
            data.extend_from_slice(&message.data);
            ended = message.end;
        }
        assert!(ended);
        assert_eq!(data, b"state");
    }

    #[tokio::test]
    async fn only_the_vmm_is_given_the_stream() {
        let (_vmm, ours) = UnixStream::pair().unwrap();
        check_vmm(&ours, std::process::id()).unwrap();
        let error = check_vmm(&ours, 1).unwrap_err().to_string();
        assert!(error.contains("process 1"), "{error}");
    }

    #[tokio::test]
    async fn vmm_is_read_from_while_what_it_wrote_waits() {
        let (vmm, ours) = UnixStream::pair().unwrap();
        let (_incoming, mut queue) = queue();
        let (sent, mut carried) = mpsc::unbounded_channel();
        let held = watch::Sender::new(true);
        let gate = held.subscribe();
        let relaying = tokio::spawn(async move {
            relay(ours, &mut queue, async |message| {
                gate.clone().wait_for(|held| !held).await.unwrap();
                sent.send(message).is_ok()
            })
            .await
        });
        let (_read, mut write) = vmm.into_split();
        // More than a socket takes.
        let state: Vec<u8> = (0..4 * MESSAGE_BYTES).map(|at| (at / 1000) as u8).collect();
        timeout(Duration::from_secs(60), write.write_all(&state)).await.expect("it is read from").unwrap();
        drop(write);
        assert!(carried.try_recv().is_err(), "it was let go");
        held.send_replace(false);
        let mut data = Vec::new();
        while let Some(message) = carried.recv().await {
            data.extend_from_slice(&message.data);
            if message.end {
                break;
            }
        }
        assert_eq!(data, state);
        relaying.abort();
    }

    #[tokio::test]
    async fn a_peer_that_is_lost_ends_the_relay() {
        let (vmm, ours) = UnixStream::pair().unwrap();
        let (_incoming, mut queue) = queue();
        let relaying =
            tokio::spawn(async move { relay(ours, &mut queue, |_| std::future::ready(false)).await });
        let (_read, mut write) = vmm.into_split();
        write.write_all(b"state").await.unwrap();
        assert!(relaying.await.unwrap().is_err());
    }
}
