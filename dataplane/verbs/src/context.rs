//! An open RDMA device, what it can do, and what happens to it.
#![allow(unsafe_code, reason = "owns an open device of libibverbs")]

use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::net::Ipv6Addr;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rdma_sys::{
    ibv_context, ibv_device, ibv_device_attr_ex, ibv_mtu, ibv_odp_general_caps, ibv_odp_transport_cap_bits,
    ibv_port_attr, ibv_port_state, ibv_transport_type,
};
use rustix::io::Errno;

use crate::cm::Identifier;
use crate::info::{LinkLayer, Transport};
use crate::os::{errno, last_errno};
use crate::status::AsyncEvent;

/// An open device.
#[derive(Debug)]
pub(crate) struct Context {
    raw: NonNull<ibv_context>,
    owner: Owner,
}

/// What keeps it open.
#[derive(Debug)]
enum Owner {
    /// Opened here, and closed on drop.
    Here,
    /// librdmacm opened it, and has it open for as long as an identifier is bound to it.
    Bound {
        /// Dropped with the context, and that is what it is here for.
        _identifier: Identifier,
    },
}

// SAFETY: libibverbs allows every call on a context from any thread at once (ibv_open_device(3),
// "thread safe"), and closing from any.
unsafe impl Send for Context {}
// SAFETY: as for `Send`.
unsafe impl Sync for Context {}

/// What a device can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) firmware: String,
    pub(crate) ports: u8,
    pub(crate) max_regions: u32,
    pub(crate) max_queue_pairs: u32,
    /// Work requests that a queue holds, at most.
    pub(crate) max_requests: u32,
    /// Whether reads and writes of connected queue pairs may meet memory that is not pinned.
    pub(crate) on_demand_paging: bool,
}

/// A port's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortState {
    pub(crate) active: bool,
    pub(crate) link_layer: LinkLayer,
    pub(crate) mtu_bytes: u32,
    pub(crate) max_mtu_bytes: u32,
    pub(crate) rate_bits_per_second: u64,
    /// Longest message.
    pub(crate) max_message_bytes: u32,
}

impl Context {
    /// The device that an identifier is bound to, for as long as that lives here.
    pub(crate) fn bound(identifier: Identifier) -> Option<Self> {
        Some(Self { raw: identifier.context()?, owner: Owner::Bound { _identifier: identifier } })
    }

    /// Opens a device of the list.
    pub(crate) fn open(device: &ListedDevice<'_>) -> Result<Self, Errno> {
        // SAFETY: the device is of a list that lives (it is borrowed).
        let raw = NonNull::new(unsafe { rdma_sys::ibv_open_device(device.raw.as_ptr()) });
        let raw = raw.ok_or_else(last_errno)?;
        Ok(Self { raw, owner: Owner::Here })
    }

    pub(crate) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    /// Whether an identifier is bound to this same device.
    pub(crate) fn is_of(&self, identifier: &Identifier) -> bool {
        identifier.context() == Some(self.raw)
    }

    pub(crate) fn name(&self) -> String {
        // SAFETY: the context is open, and names its device.
        unsafe { device_name((*self.raw()).device) }
    }

    pub(crate) fn transport(&self) -> Transport {
        // SAFETY: as for `name`.
        match unsafe { (*(*self.raw()).device).transport_type } {
            ibv_transport_type::IBV_TRANSPORT_IB => Transport::InfiniBand,
            ibv_transport_type::IBV_TRANSPORT_IWARP => Transport::Iwarp,
            _ => Transport::Other,
        }
    }

    pub(crate) fn capabilities(&self) -> Result<Capabilities, Errno> {
        // SAFETY: every field is a number or an array of numbers, for which zero is a value.
        let mut attributes: ibv_device_attr_ex = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, and `attributes` a place for the answer.
        let result = unsafe { rdma_sys::ibv_query_device_ex(self.raw(), ptr::null(), &mut attributes) };
        if result != 0 {
            return Err(errno(result));
        }
        let device = &attributes.orig_attr;
        let count = |value: c_int| u32::try_from(value).unwrap_or(0);
        let paging = &attributes.odp_caps;
        let needed = ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0
            | ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_READ.0;
        Ok(Capabilities {
            firmware: text(&device.fw_ver),
            ports: device.phys_port_cnt,
            max_regions: count(device.max_mr),
            max_queue_pairs: count(device.max_qp),
            max_requests: count(device.max_qp_wr),
            on_demand_paging: paging.general_caps & u64::from(ibv_odp_general_caps::IBV_ODP_SUPPORT.0) != 0
                && paging.per_transport_caps.rc_odp_caps & needed == needed,
        })
    }

    pub(crate) fn port(&self, port: u8) -> Result<PortState, Errno> {
        // SAFETY: every field is a number, for which zero is a value.
        let mut attributes: ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, and `attributes` a place for the answer.
        let result = unsafe { rdma_sys::___ibv_query_port(self.raw(), port, &mut attributes) };
        if result != 0 {
            return Err(errno(result));
        }
        Ok(PortState {
            active: attributes.state == ibv_port_state::IBV_PORT_ACTIVE,
            link_layer: LinkLayer::from_raw(attributes.link_layer),
            mtu_bytes: mtu_bytes(attributes.active_mtu),
            max_mtu_bytes: mtu_bytes(attributes.max_mtu),
            rate_bits_per_second: rate_bits_per_second(attributes.active_width, attributes.active_speed),
            max_message_bytes: attributes.max_msg_sz,
        })
    }

    /// Entries of the address tables of all ports (GIDs) that hold something, with their port.
    pub(crate) fn address_table(&self) -> Result<Vec<(u8, Ipv6Addr)>, Errno> {
        // The kernel takes an answer of less than 64 KiB. Only entries that hold something count.
        const MOST: usize = u16::MAX as usize / size_of::<TableEntry>();
        let mut entries = vec![TableEntry::default(); MOST];
        // SAFETY: the context is open; there is room for `MOST` entries of the size that is told.
        let count = unsafe {
            _ibv_query_gid_table(self.raw(), entries.as_mut_ptr(), MOST, 0, size_of::<TableEntry>())
        };
        let count = usize::try_from(count).map_err(|_| errno(i32::try_from(-count).unwrap_or(0)))?;
        let entries = entries.into_iter().take(count);
        Ok(entries.map(|entry| (entry.port as u8, Ipv6Addr::from(entry.gid))).collect())
    }

    /// Readable when something has happened to the device.
    pub(crate) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and so is its descriptor until it is closed on drop.
        unsafe { BorrowedFd::borrow_raw((*self.raw()).async_fd) }
    }

    /// What has happened, if anything has; the descriptor must be non-blocking.
    pub(crate) fn next_async_event(&self) -> Result<Option<AsyncEvent>, Errno> {
        let mut raw = MaybeUninit::<RawAsyncEvent>::zeroed();
        // SAFETY: the context is open; `RawAsyncEvent` is laid out as `struct ibv_async_event`.
        // It is not read as the bindings' type, of which an unknown event is no value.
        if unsafe { rdma_sys::ibv_get_async_event(self.raw(), raw.as_mut_ptr().cast()) } != 0 {
            return match last_errno() {
                Errno::AGAIN | Errno::INTR => Ok(None),
                errno => Err(errno),
            };
        }
        // SAFETY: the call filled it, and any bytes are a value of it.
        let event = unsafe { raw.assume_init() };
        let queue_pair = || {
            let queue_pair = event.element as *const rdma_sys::ibv_qp;
            // SAFETY: for events of queue pairs the element points to one, which lives until the
            // event is acknowledged (`ibv_destroy_qp` waits for that).
            unsafe { (*queue_pair).qp_num }
        };
        let told = AsyncEvent::from_raw(event.kind, queue_pair, event.element as u32 as u8);
        // SAFETY: the event came from `ibv_get_async_event`, and is acknowledged once.
        unsafe { rdma_sys::ibv_ack_async_event(raw.as_mut_ptr().cast()) };
        Ok(Some(told))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Owner::Here = self.owner {
            // SAFETY: opened by `open`, closed once; nothing is made on contexts opened here.
            let _ = unsafe { rdma_sys::ibv_close_device(self.raw()) };
        }
    }
}

/// `struct ibv_gid_entry` of libibverbs, which the bindings leave out.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct TableEntry {
    gid: [u8; 16],
    index: u32,
    port: u32,
    kind: u32,
    interface: u32,
}

const _: () = assert!(size_of::<TableEntry>() == 32);

unsafe extern "C" {
    /// Behind the inline function `ibv_query_gid_table`; exported since libibverbs 32.
    fn _ibv_query_gid_table(
        context: *mut ibv_context,
        entries: *mut TableEntry,
        most: usize,
        flags: u32,
        entry_size: usize,
    ) -> isize;
}

/// `struct ibv_async_event`, with the event a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawAsyncEvent {
    /// A pointer, or a port in its first four bytes.
    element: usize,
    kind: c_int,
}

const _: () = assert!(size_of::<RawAsyncEvent>() == size_of::<rdma_sys::ibv_async_event>());
const _: () = assert!(size_of::<rdma_sys::ibv_wc>() == 48);
const _: () = assert!(size_of::<rdma_sys::ibv_send_wr>() == 128);
const _: () = assert!(size_of::<rdma_sys::rdma_cm_event>() == 80);
const _: () = assert!(size_of::<rdma_sys::rdma_cm_id>() == 416);

/// The RDMA devices of this host.
#[derive(Debug)]
pub(crate) struct DeviceList {
    /// `None` where there are none.
    raw: Option<NonNull<*mut ibv_device>>,
    count: usize,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListedDevice<'l> {
    raw: NonNull<ibv_device>,
    list: std::marker::PhantomData<&'l DeviceList>,
}

impl DeviceList {
    /// # Errors
    /// What the kernel says; a kernel without RDMA has an empty list.
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut count: c_int = 0;
        // SAFETY: `count` is a place for a number.
        let raw = NonNull::new(unsafe { rdma_sys::ibv_get_device_list(&mut count) });
        if raw.is_none() {
            return match last_errno() {
                Errno::NOSYS | Errno::NOENT | Errno::NODEV => Ok(Self { raw: None, count: 0 }),
                errno => Err(errno),
            };
        }
        Ok(Self { raw, count: usize::try_from(count).unwrap_or(0) })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = ListedDevice<'_>> {
        let start = self.raw.map(NonNull::as_ptr);
        (0..self.count).filter_map(move |index| {
            // SAFETY: the list has `count` entries, and lives while it is borrowed.
            let raw = NonNull::new(unsafe { *start?.add(index) })?;
            Some(ListedDevice { raw, list: std::marker::PhantomData })
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if let Some(raw) = self.raw {
            // SAFETY: the list came from `ibv_get_device_list`, and is freed once; whatever was
            // taken from it borrowed it, and what was opened keeps its device.
            unsafe { rdma_sys::ibv_free_device_list(raw.as_ptr()) };
        }
    }
}

impl ListedDevice<'_> {
    pub(crate) fn name(&self) -> String {
        // SAFETY: the list that has the device lives (it is borrowed).
        unsafe { device_name(self.raw.as_ptr()) }
    }
}

/// # Safety
/// `device` must be of a list that lives, or of an open context.
unsafe fn device_name(device: *mut ibv_device) -> String {
    // SAFETY: the caller vouches for the device; its name is a C string within it.
    let name = unsafe { CStr::from_ptr(rdma_sys::ibv_get_device_name(device)) };
    name.to_string_lossy().into_owned()
}

/// A C string in an array.
fn text(bytes: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn mtu_bytes(mtu: ibv_mtu::Type) -> u32 {
    match mtu {
        ibv_mtu::IBV_MTU_256..=ibv_mtu::IBV_MTU_4096 => 128 << mtu,
        _ => 0,
    }
}

/// From the codes of a port's width and speed; 0 where one is not known.
fn rate_bits_per_second(width: u8, speed: u8) -> u64 {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 0,
    };
    let lane_megabits = match speed {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_000,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        _ => 0,
    };
    lanes * lane_megabits * 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_mtus_are_those_of_the_codes() {
        assert_eq!(rate_bits_per_second(2, 32), 100_000_000_000);
        assert_eq!(rate_bits_per_second(2, 4), 40_000_000_000);
        assert_eq!(rate_bits_per_second(3, 32), 0);
        assert_eq!((mtu_bytes(1), mtu_bytes(3), mtu_bytes(5), mtu_bytes(6)), (256, 1024, 4096, 0));
    }

    #[test]
    fn a_name_ends_at_its_zero() {
        assert_eq!(text(&[b'1' as _, b'.' as _, b'2' as _, 0, b'x' as _]), "1.2");
        assert_eq!(text(&[b'1' as _]), "1");
    }
}
