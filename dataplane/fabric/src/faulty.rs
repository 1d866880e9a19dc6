//! A link that fails on purpose.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{Completion, Link, LinkError, OpError, OpId, PostError, Transfer};

/// What goes wrong on a [`FaultyLink`]. By default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// It dies at the first poll after so many operations were accepted.
    pub die_after_operations: Option<u64>,
    /// It dies at the first poll after operations of so many bytes were accepted.
    pub die_after_bytes: Option<u64>,
    /// The operation of this number, from 1, is lost: it never reaches the peer, and the link dies of it.
    pub lose_operation: Option<u64>,
    /// Completions that come together come the other way round. A fence proves what was posted before it
    /// all the same.
    pub reverse_completions: bool,
    /// Every completion is held back for so many polls.
    pub delay_polls: u32,
    /// Every so many posts, one is answered with [`PostError::Full`].
    pub refuse_every: Option<u64>,
}

/// A link that carries operations out over another, and injects [`Faults`].
pub struct FaultyLink {
    /// `None` once it died.
    inner: Option<Box<dyn Link>>,
    faults: Faults,
    posts: u64,
    operations: u64,
    bytes: u64,
    polls: u64,
    /// Accepted, and not completed by the inner link.
    outstanding: Vec<OpId>,
    /// Completed by the inner link, and the poll that delivers them.
    held: VecDeque<(u64, Completion)>,
    dead: Option<LinkError>,
}

impl FaultyLink {
    /// Injects `faults` into `inner`.
    pub fn new(inner: Box<dyn Link>, faults: Faults) -> Self {
        Self {
            inner: Some(inner),
            faults,
            posts: 0,
            operations: 0,
            bytes: 0,
            polls: 0,
            outstanding: Vec::new(),
            held: VecDeque::new(),
            dead: None,
        }
    }

    /// Why the link of an injected fault is dead.
    pub fn injected() -> LinkError {
        LinkError::Fabric("injected fault".to_owned())
    }

    fn post(
        &mut self,
        id: OpId,
        bytes: u32,
        post: impl FnOnce(&mut dyn Link) -> Result<(), PostError>,
    ) -> Result<(), PostError> {
        let Some(inner) = &mut self.inner else {
            return Err(PostError::Dead(self.dead.clone().unwrap_or_else(Self::injected)));
        };
        self.posts += 1;
        if self.faults.refuse_every.is_some_and(|every| every > 0 && self.posts.is_multiple_of(every)) {
            return Err(PostError::Full);
        }
        if self.faults.lose_operation != Some(self.operations + 1) {
            post(&mut **inner)?;
        }
        self.outstanding.push(id);
        self.operations += 1;
        self.bytes += u64::from(bytes);
        Ok(())
    }

    fn is_due(&self) -> bool {
        let last = [self.faults.die_after_operations, self.faults.lose_operation];
        last.into_iter().flatten().any(|limit| self.operations >= limit)
            || self.faults.die_after_bytes.is_some_and(|limit| self.bytes >= limit)
    }

    fn die(&mut self, error: LinkError) {
        // Dropped, not closed: the peer loses it as it would a host that crashed.
        self.inner = None;
        for id in self.outstanding.drain(..) {
            let result = Err(OpError::LinkDead(error.clone()));
            self.held.push_back((self.polls, Completion { id, result }));
        }
        self.dead = Some(error);
    }

    fn take_from_inner(&mut self) {
        let Some(inner) = &mut self.inner else { return };
        let mut completed = Vec::new();
        inner.poll(&mut completed);
        let dead = inner.is_dead().cloned();
        for completion in completed {
            let position = self.outstanding.iter().position(|id| *id == completion.id);
            let position = position.expect("the inner link completes what it accepted, once");
            self.outstanding.swap_remove(position);
            self.held.push_back((self.polls + u64::from(self.faults.delay_polls), completion));
        }
        if let Some(error) = dead
            && self.outstanding.is_empty()
        {
            self.die(error);
        }
    }
}

impl Link for FaultyLink {
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post(op.id, op.length, |link| link.post_write(op))
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post(op.id, op.length, |link| link.post_read(op))
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.post(id, 0, |link| link.post_fence(id))
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        self.polls += 1;
        if self.inner.is_some() && self.is_due() {
            self.die(Self::injected());
        }
        self.take_from_inner();
        let before = completions.len();
        while let Some((due, _)) = self.held.front()
            && (*due <= self.polls || self.dead.is_some())
        {
            completions.extend(self.held.pop_front().map(|(_, completion)| completion));
        }
        if self.faults.reverse_completions {
            completions[before..].reverse();
        }
        completions.len() - before
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        if !self.held.is_empty() {
            return Ok(());
        }
        let due = self.is_due();
        match (&mut self.inner, &self.dead) {
            (Some(_), _) if due => Ok(()),
            (Some(inner), _) => inner.wait(timeout),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Err(Self::injected()),
        }
    }

    fn close(self: Box<Self>) {
        if let Some(inner) = self.inner {
            inner.close();
        }
    }

    fn is_dead(&self) -> Option<&LinkError> {
        self.dead.as_ref()
    }
}
