//! What this host, or the network between two, can do: the limits that a fabric
//! is measured beside.
//!
//! [`memcpy`] and [`sockets`] move the bytes that `pages` name from one guest's
//! memory to another's of the same layout, in pieces of `piece_bytes`, and give
//! the time that took. [`Sender`] and [`serve`] are the two ends of one plain
//! connection, on one host or two.
#![allow(unsafe_code, reason = "sends and receives guest RAM, of which there are no slices")]

mod plain;

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use ramferry_ram::{BlockRange, Memory, PageSets, RamError};
use thiserror::Error;

pub use plain::{Sender, serve};

/// As the tcp fabric asks for.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Why a limit could not be measured.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LimitError {
    /// The memory cannot be read or written.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The sockets do not work.
    #[error("the sockets of the measurement failed: {0}")]
    Socket(#[from] io::Error),
    /// Somebody else connected, or is listening.
    #[error("the peer of the measurement is not the one that was expected")]
    Stranger,
}

/// Copies by `memcpy`, in one thread.
///
/// # Errors
/// When the memory cannot be read or written.
pub fn memcpy(
    from: &Memory,
    to: &Memory,
    pages: &PageSets,
    piece_bytes: u64,
) -> Result<Duration, LimitError> {
    let pieces = pieces(pages, piece_bytes);
    let started = Instant::now();
    for range in pieces {
        to.span(range)?.copy_from(from.span(range)?);
    }
    Ok(started.elapsed())
}

/// Sends from the one memory and receives into the other, over `streams`
/// connections to a listener at `address`, with a thread at each of their ends.
///
/// # Errors
/// When a socket fails, or the memory cannot be read or written.
pub fn sockets(
    from: &Memory,
    to: &Memory,
    pages: &PageSets,
    piece_bytes: u64,
    address: IpAddr,
    streams: usize,
) -> Result<Duration, LimitError> {
    let pieces = pieces(pages, piece_bytes);
    let share = pieces.len().div_ceil(streams.max(1)).max(1);
    let listener = TcpListener::bind((address, 0))?;
    let address = listener.local_addr()?;
    let mut connections = Vec::new();
    for _ in pieces.chunks(share) {
        let sender = TcpStream::connect(address)?;
        rustix::net::sockopt::set_socket_send_buffer_size(&sender, SOCKET_BUFFER_BYTES)
            .map_err(io::Error::from)?;
        connections.push((sender, listener.accept()?.0));
    }
    let started = Instant::now();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (pieces, (sender, receiver)) in pieces.chunks(share).zip(connections) {
            threads.push(scope.spawn(move || send(sender, from, pieces)));
            threads.push(scope.spawn(move || receive(receiver, to, pieces)));
        }
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(started.elapsed())
}

fn pieces(pages: &PageSets, piece_bytes: u64) -> Vec<BlockRange> {
    let mut pieces = Vec::new();
    for (block, set) in pages.iter() {
        let page_bytes = pages.page_bytes(block);
        let most = (piece_bytes / page_bytes).max(1);
        let mut from = 0;
        while let Some(run) = set.next_run_capped(from, most) {
            from = run.end();
            let (offset, length) = (run.first * page_bytes, run.count * page_bytes);
            pieces.push(BlockRange { block, offset, length });
        }
    }
    pieces
}

fn send(mut socket: TcpStream, from: &Memory, pieces: &[BlockRange]) -> Result<(), LimitError> {
    pieces.iter().try_for_each(|piece| send_range(&socket, from, *piece))?;
    socket.read_exact(&mut [0])?;
    Ok(())
}

fn send_range(socket: &TcpStream, from: &Memory, range: BlockRange) -> Result<(), LimitError> {
    let mut rest = range;
    while rest.length > 0 {
        let span = from.span(rest)?;
        let (start, length) = (span.as_ptr().cast(), span.len());
        // SAFETY: the kernel reads the span's bytes, which are mapped while it is borrowed.
        let sent = unsafe { libc::send(socket.as_raw_fd(), start, length, libc::MSG_NOSIGNAL) };
        rest = behind(rest, sent)?;
    }
    Ok(())
}

fn receive(mut socket: TcpStream, to: &Memory, pieces: &[BlockRange]) -> Result<(), LimitError> {
    pieces.iter().try_for_each(|piece| receive_range(&socket, to, *piece))?;
    socket.write_all(&[1])?;
    Ok(())
}

fn receive_range(socket: &TcpStream, to: &Memory, range: BlockRange) -> Result<(), LimitError> {
    let mut rest = range;
    while rest.length > 0 {
        let span = to.span(rest)?;
        let start = span.as_mut_ptr()?;
        // SAFETY: the kernel writes the span's bytes, which are mapped writable while it is
        // borrowed (`as_mut_ptr` checked that), and of which no reference is ever made.
        let received = unsafe { libc::recv(socket.as_raw_fd(), start.cast(), span.len(), libc::MSG_WAITALL) };
        rest = behind(rest, received)?;
    }
    Ok(())
}

/// What is left after a call moved that many bytes.
fn behind(range: BlockRange, moved: isize) -> Result<BlockRange, io::Error> {
    match u64::try_from(moved) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(moved) => Ok(BlockRange { offset: range.offset + moved, length: range.length - moved, ..range }),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    use ramferry_ram::{Access, Block, BlockIndex, Layout, PageRun, RamFile};
    use rustix::fs::MemfdFlags;

    pub(super) const PAGES: u64 = 600;

    pub(super) fn memory() -> Memory {
        let descriptor = rustix::fs::memfd_create("limits", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&descriptor, PAGES * 4096).unwrap();
        let file = RamFile::from_fd(descriptor, Access::ReadWrite).unwrap();
        let block =
            Block { name: "ram".into(), guest_address: 0, length_bytes: PAGES * 4096, page_bytes: 4096 };
        Memory::new(Layout::new(vec![block]).unwrap(), vec![file], Access::ReadWrite).unwrap()
    }

    #[test]
    fn both_limits_move_exactly_the_pages_named() {
        let from = memory();
        let page = |page: u64| BlockRange { block: BlockIndex(0), offset: page * 4096, length: 4096 };
        let mut pages = PageSets::new(from.layout());
        for run in [
            PageRun { first: 0, count: 1 },
            PageRun { first: 7, count: 300 },
            PageRun { first: 599, count: 1 },
        ] {
            pages.block_mut(BlockIndex(0)).insert_run(run);
        }
        (0..PAGES).for_each(|at| from.span(page(at)).unwrap().write_from(&[at as u8 | 1; 4096]));
        let (copied, sent) = (memory(), memory());
        memcpy(&from, &copied, &pages, 1 << 20).unwrap();
        sockets(&from, &sent, &pages, 64 << 10, Ipv4Addr::LOCALHOST.into(), 3).unwrap();
        for to in [copied, sent] {
            assert_eq!(to.presence().unwrap(), pages);
            for at in [0, 7, 8, 306, 599] {
                let mut bytes = [0; 4096];
                to.span(page(at)).unwrap().read_into(&mut bytes);
                assert_eq!(bytes, [at as u8 | 1; 4096], "page {at}");
            }
        }
    }
}
