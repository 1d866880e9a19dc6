//! Passing the RAM files and the table of regions to a link.
//!
//! The table comes first, in a message of its own; then the blocks, a few a
//! message. Message: magic, blocks in all, blocks in this message, then each
//! block's length and whether it may be written. Descriptors in the same order.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use ramferry_ram::{Access, BlockIndex, Layout, Memory};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::failed;
use super::peer::GrantedFile;
use super::table::Table;
use crate::LinkError;
use crate::session::wait_readable;

const MAGIC: [u8; 8] = *b"rf-grant";
/// Blocks, thus descriptors, in one message.
const BATCH: usize = 16;
const HEAD_BYTES: usize = 16;
const BLOCK_BYTES: usize = 16;
const MESSAGE_BYTES: usize = HEAD_BYTES + BATCH * BLOCK_BYTES;

const _: () = assert!(HEAD_BYTES == MAGIC.len() + 2 * size_of::<u32>());

/// What a peer granted to a link.
pub(super) struct Granted {
    pub(super) table: Table,
    /// Of its blocks, in the layout's order, of the layout's lengths.
    pub(super) files: Vec<GrantedFile>,
}

/// Grants the blocks of `memory` and the table to the peer.
pub(super) fn send(socket: &OwnedFd, memory: &Memory, table: &Table) -> Result<(), LinkError> {
    let blocks = memory.layout().blocks();
    let total = u32::try_from(blocks.len()).map_err(|_| LinkError::Layout("too many blocks"))?;
    send_message(socket, &head(total, 0), &[table.as_fd()])?;
    let indices: Vec<BlockIndex> = (0..total).map(BlockIndex).collect();
    for batch in indices.chunks(BATCH) {
        let mut message = head(total, batch.len() as u32);
        let mut descriptors = Vec::with_capacity(batch.len());
        for index in batch {
            let writable = memory.mapping(*index).access() == Access::ReadWrite;
            message.extend_from_slice(&blocks[index.get()].length_bytes.to_le_bytes());
            message.extend_from_slice(&u64::from(writable).to_le_bytes());
            descriptors.push(memory.file(*index).as_fd());
        }
        send_message(socket, &message, &descriptors)?;
    }
    Ok(())
}

fn head(total: u32, here: u32) -> Vec<u8> {
    let mut message = Vec::with_capacity(MESSAGE_BYTES);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&total.to_le_bytes());
    message.extend_from_slice(&here.to_le_bytes());
    message
}

fn send_message(socket: &OwnedFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "room for a batch");
    // A peer that reads none of it leaves no room some day; it is not waited for.
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(message)],
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
    .map(|_| ())
    .map_err(LinkError::Lost)
}

/// Takes what the peer grants.
pub(super) fn receive(
    socket: &OwnedFd,
    layout: &Layout,
    deadline: Instant,
    timeout: Duration,
) -> Result<Granted, LinkError> {
    let (_, mut descriptors) = receive_message(socket, layout, deadline, timeout)?;
    let table = descriptors.pop().ok_or(LinkError::PeerProtocol("a grant without a table"))?;
    let table = Table::open(table).map_err(failed("map the peer's table of regions"))?;
    let mut files = Vec::with_capacity(layout.blocks().len());
    while files.len() < layout.blocks().len() {
        let (granted, descriptors) = receive_message(socket, layout, deadline, timeout)?;
        if granted.is_empty() || granted.len() != descriptors.len() {
            return Err(LinkError::PeerProtocol("a grant without its descriptors"));
        }
        for ((length_bytes, writable), descriptor) in granted.into_iter().zip(descriptors) {
            let block = layout.blocks().get(files.len()).ok_or(LinkError::Layout("there are more"))?;
            if block.length_bytes != length_bytes {
                return Err(LinkError::Layout("one has another length"));
            }
            let access = if writable { Access::ReadWrite } else { Access::Read };
            files.push(GrantedFile { descriptor, access });
        }
    }
    Ok(Granted { table, files })
}

type Blocks = Vec<(u64, bool)>;

fn receive_message(
    socket: &OwnedFd,
    layout: &Layout,
    deadline: Instant,
    timeout: Duration,
) -> Result<(Blocks, Vec<OwnedFd>), LinkError> {
    let mut message = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, flags) {
            Ok(received) if received.bytes == 0 => return Err(LinkError::PeerClosed),
            Ok(received) => break received.bytes,
            Err(Errno::AGAIN) => wait_readable(socket.as_fd(), deadline, timeout)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(LinkError::Lost(errno)),
        }
    };
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let blocks = decode(&message[..received]).ok_or(LinkError::PeerProtocol("malformed grant"))?;
    let (total, blocks) = blocks;
    if total as usize != layout.blocks().len() {
        return Err(LinkError::Layout("their number differs"));
    }
    Ok((blocks, descriptors))
}

fn decode(message: &[u8]) -> Option<(u32, Blocks)> {
    let (head, blocks) = message.split_at_checked(HEAD_BYTES)?;
    if head[..8] != MAGIC {
        return None;
    }
    let total = u32::from_le_bytes(head[8..12].try_into().ok()?);
    let here = u32::from_le_bytes(head[12..16].try_into().ok()?) as usize;
    if here > BATCH || blocks.len() != here * BLOCK_BYTES {
        return None;
    }
    let blocks = blocks.chunks_exact(BLOCK_BYTES).map(|block| {
        let length = u64::from_le_bytes(block[..8].try_into().ok()?);
        let writable = u64::from_le_bytes(block[8..].try_into().ok()?);
        (writable <= 1).then_some((length, writable == 1))
    });
    Some((total, blocks.collect::<Option<Vec<_>>>()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_grants_never_panic(message in proptest::collection::vec(any::<u8>(), 0..MESSAGE_BYTES)) {
            prop_assert_eq!(decode(&message), None);
        }

        #[test]
        fn random_blocks_never_panic(blocks in proptest::collection::vec(any::<u8>(), 0..256), here in 0_u32..20) {
            let mut message = head(1, here);
            message.extend_from_slice(&blocks);
            if let Some((_, decoded)) = decode(&message) {
                prop_assert_eq!(decoded.len(), here as usize);
            }
        }
    }
}
