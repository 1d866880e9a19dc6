use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, RamFile};
use rustix::fs::MemfdFlags;

use crate::{
    Completion, Domain, FabricKind, Link, LinkError, OpError, OpId, Place, PostError, Region, Rights,
    SessionToken, Transfer,
};

/// Lengths of the blocks of both sides' memory.
pub const BLOCK_LENGTHS_BYTES: [u64; 2] = [2 << 20, 1 << 20];
/// Nothing in the suite may take longer.
const LIMIT: Duration = Duration::from_secs(30);

/// One fabric, for the suite.
pub trait Fixture {
    /// Its registered memory.
    type Domain: Domain + 'static;
    /// A session at the side that is written to, and where it is reached.
    /// Dropping it ends the session.
    type Destination: Send;

    /// Which fabric it is.
    fn kind(&self) -> FabricKind;
    /// Whether this host has what the fabric needs; says so where it has not.
    fn is_available(&self) -> bool {
        true
    }
    /// How the side that connects maps memory that is only to be sent.
    fn source_access(&self) -> Access {
        Access::Read
    }
    /// The registered memory of the side that connects.
    fn domain(&self, memory: Arc<Memory>) -> Arc<Self::Domain>;
    /// The registered memory of the side that is connected to, where that is made in another way.
    fn destination_domain(&self, memory: Arc<Memory>) -> Arc<Self::Domain> {
        self.domain(memory)
    }
    /// Admits `token` to `domain`, over at most `links` links.
    fn admit(&self, token: SessionToken, domain: Arc<Self::Domain>, links: u32) -> Self::Destination;
    /// Connects to a session.
    ///
    /// # Errors
    /// The link's own.
    fn connect(
        &self,
        to: &Self::Destination,
        token: &SessionToken,
        domain: Arc<Self::Domain>,
    ) -> Result<Box<dyn Link>, LinkError>;
    /// What the session says of its links.
    fn failure(&self, of: &Self::Destination) -> Option<LinkError>;
    /// A link to a peer that accepts the session and then does nothing for as long
    /// as the second value lives. `None` where the peer takes no part anyway.
    fn stalled(&self, domain: Arc<Self::Domain>) -> Option<(Box<dyn Link>, Box<dyn Any>)>;
}

/// Memory of a guest that does not exist.
pub struct TestMemory {
    /// The memory.
    pub memory: Arc<Memory>,
}

impl TestMemory {
    /// Blocks of [`BLOCK_LENGTHS_BYTES`], every byte of which is told by `seed` and its place.
    pub fn patterned(seed: u8, access: Access) -> Self {
        Self::with_blocks(seed, access, &BLOCK_LENGTHS_BYTES)
    }

    /// Blocks of the given lengths, every byte of which is told by `seed` and its place.
    pub fn with_blocks(seed: u8, access: Access, lengths: &[u64]) -> Self {
        let mut blocks = Vec::new();
        let mut files = Vec::new();
        let mut guest_address = 0;
        for (index, length_bytes) in lengths.iter().copied().enumerate() {
            blocks.push(Block { name: format!("ram{index}"), guest_address, length_bytes, page_bytes: 4096 });
            guest_address += length_bytes;
            let fd = rustix::fs::memfd_create("ramferry-test", MemfdFlags::CLOEXEC).expect("a memfd");
            rustix::fs::ftruncate(&fd, length_bytes).expect("a memfd of this length");
            files.push(RamFile::from_fd(fd, Access::ReadWrite).expect("a RAM file"));
        }
        let layout = Layout::new(blocks).expect("a layout");
        let writable = Memory::new(layout.clone(), files.clone(), Access::ReadWrite).expect("memory");
        for (index, length) in lengths.iter().copied().enumerate() {
            let range = BlockRange { block: BlockIndex(index as u32), offset: 0, length };
            let pattern: Vec<u8> = (0..length).map(|at| pattern(seed, index as u64, at)).collect();
            writable.span(range).expect("a span").write_from(&pattern);
        }
        let memory = match access {
            Access::ReadWrite => writable,
            Access::Read => Memory::new(layout, files, access).expect("memory"),
        };
        Self { memory: Arc::new(memory) }
    }

    /// The bytes of a range.
    pub fn bytes(&self, range: BlockRange) -> Vec<u8> {
        let mut bytes = vec![0; range.length as usize];
        self.memory.span(range).expect("a span").read_into(&mut bytes);
        bytes
    }

    /// The bytes of every block.
    pub fn all(&self) -> Vec<Vec<u8>> {
        let blocks = self.memory.layout().blocks().iter().enumerate();
        blocks
            .map(|(index, block)| {
                let block_index = BlockIndex(index as u32);
                self.bytes(BlockRange { block: block_index, offset: 0, length: block.length_bytes })
            })
            .collect()
    }
}

fn pattern(seed: u8, block: u64, at: u64) -> u8 {
    let mixed = (at ^ (block << 40) ^ (u64::from(seed) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

/// Both sides of a session.
pub struct Pair<'f, F: Fixture> {
    /// The fabric.
    pub fixture: &'f F,
    /// The session's token.
    pub token: SessionToken,
    /// Memory that is written from.
    pub source: TestMemory,
    /// Memory that is written to.
    pub destination: TestMemory,
    /// Registered memory of the source.
    pub source_domain: Arc<F::Domain>,
    /// Registered memory of the destination.
    pub destination_domain: Arc<F::Domain>,
    /// The session; `None` once it was ended.
    pub session: Option<F::Destination>,
}

impl<'f, F: Fixture> Pair<'f, F> {
    /// A session of two links between memories with different contents.
    pub fn new(fixture: &'f F) -> Self {
        Self::between(
            fixture,
            TestMemory::patterned(1, Access::ReadWrite),
            TestMemory::patterned(2, Access::ReadWrite),
        )
    }

    /// A session of two links between two memories.
    pub fn between(fixture: &'f F, source: TestMemory, destination: TestMemory) -> Self {
        let token = SessionToken::random().expect("randomness");
        let source_domain = fixture.domain(Arc::clone(&source.memory));
        let destination_domain = fixture.destination_domain(Arc::clone(&destination.memory));
        let session = Some(fixture.admit(token.clone(), Arc::clone(&destination_domain), 2));
        Self { fixture, token, source, destination, source_domain, destination_domain, session }
    }

    /// Tries to make a link.
    ///
    /// # Errors
    /// The link's own.
    pub fn try_link(&self) -> Result<Box<dyn Link>, LinkError> {
        let session = self.session.as_ref().expect("a session that was not ended");
        self.fixture.connect(session, &self.token, Arc::clone(&self.source_domain))
    }

    /// A link, ready to be driven.
    pub fn link(&self) -> Drive {
        // A place that a link which just ended held is free a moment later.
        let start = Instant::now();
        loop {
            match self.try_link() {
                Ok(link) => return Drive::new(link),
                Err(LinkError::TooManyLinks) if start.elapsed() < LIMIT => std::thread::yield_now(),
                Err(error) => panic!("no link: {error}"),
            }
        }
    }

    /// Registers the same range at both sides: for the local and the remote place.
    pub fn register(&self, range: BlockRange, rights: Rights) -> (Region, Region) {
        let source = self.source_domain.register(range, Rights::LOCAL).expect("a local region");
        let destination = self.destination_domain.register(range, rights).expect("a remote region");
        (source, destination)
    }
}

/// A link, and what it completed.
pub struct Drive {
    /// The link.
    pub link: Box<dyn Link>,
    /// Everything that completed, in that order.
    pub completions: Vec<Completion>,
    accepted: usize,
}

impl Drive {
    /// Drives `link`, of which nothing was asked yet.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self { link, completions: Vec::new(), accepted: 0 }
    }

    /// Posts a write, polling while the queue is full.
    ///
    /// # Errors
    /// The link's own.
    pub fn write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post(|link| link.post_write(op))
    }

    /// Posts a write, and polls in no case.
    ///
    /// # Errors
    /// The link's own.
    pub fn try_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.link.post_write(op)?;
        self.accepted += 1;
        Ok(())
    }

    /// Posts a read, polling while the queue is full.
    ///
    /// # Errors
    /// The link's own.
    pub fn read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post(|link| link.post_read(op))
    }

    /// Posts a fence, polling while the queue is full.
    ///
    /// # Errors
    /// The link's own.
    pub fn fence(&mut self, id: u64) -> Result<(), PostError> {
        self.post(|link| link.post_fence(OpId(id)))
    }

    fn post(
        &mut self,
        mut post: impl FnMut(&mut dyn Link) -> Result<(), PostError>,
    ) -> Result<(), PostError> {
        let start = Instant::now();
        loop {
            match post(&mut *self.link) {
                Err(PostError::Full) => {
                    assert!(start.elapsed() < LIMIT, "a queue that stays full");
                    self.poll();
                }
                Ok(()) => {
                    self.accepted += 1;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Polls once.
    pub fn poll(&mut self) {
        let before = self.completions.len();
        let count = self.link.poll(&mut self.completions);
        assert_eq!(before + count, self.completions.len(), "poll says how many it added");
        assert!(self.completions.len() <= self.accepted, "more completions than operations");
    }

    /// Operations accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted
    }

    /// Polls until everything accepted has completed.
    pub fn drain(&mut self) {
        let start = Instant::now();
        while self.completions.len() < self.accepted {
            assert!(start.elapsed() < LIMIT, "{} of {} completed", self.completions.len(), self.accepted);
            self.poll();
            if self.completions.len() < self.accepted {
                self.link.wait(Duration::from_millis(50)).expect("a link with operations under way waits");
            }
        }
        // Nothing completes twice.
        for _ in 0..10 {
            self.poll();
        }
    }

    /// Polls until everything completed, which must be well.
    pub fn succeed(&mut self) {
        self.drain();
        for completion in &self.completions {
            assert_eq!(completion.result, Ok(()), "operation {:?}", completion.id);
        }
    }

    /// What the operation with this label came to.
    pub fn result(&self, id: u64) -> &Result<(), OpError> {
        let mut found = self.completions.iter().filter(|completion| completion.id == OpId(id));
        let result = &found.next().expect("a completion").result;
        assert!(found.next().is_none(), "one completion");
        result
    }
}

/// `length` bytes at `offset` in block 0.
pub(super) fn range(offset: u64, length: u64) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset, length }
}

/// A transfer between the same offsets of both sides.
pub(super) fn transfer(id: u64, local: Region, remote: Region, offset: u64, length: u32) -> Transfer {
    Transfer {
        id: OpId(id),
        local: Place { key: local.key, offset },
        remote: Place { key: remote.key, offset },
        length,
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within a bounded time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
