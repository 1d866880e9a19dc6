//! What holds a sender back before a switch overflows: priority flow control (PFC) and pause frames, as the kernel tells of
//! them over netlink (DCB, ethtool). Everything is asked for, and nothing is set.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// Of one interface; each part, or why its driver does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::diagnostics) struct Flow {
    pub(in crate::diagnostics) pfc: Result<Pfc, String>,
    pub(in crate::diagnostics) pause: Result<Pause, String>,
}

/// Priority flow control.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::diagnostics) struct Pfc {
    /// Those for which it is on.
    pub(in crate::diagnostics) priorities: Vec<u8>,
    pub(in crate::diagnostics) sent_frames: u64,
    pub(in crate::diagnostics) received_frames: u64,
}

/// Pause frames, which hold back every priority at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::diagnostics) struct Pause {
    pub(in crate::diagnostics) is_received: bool,
    pub(in crate::diagnostics) is_sent: bool,
    /// `None` where the driver does not count them.
    pub(in crate::diagnostics) sent_frames: Option<u64>,
    pub(in crate::diagnostics) received_frames: Option<u64>,
}

impl Default for Flow {
    fn default() -> Self {
        let nobody = || "it was not asked for".to_owned();
        Self { pfc: Err(nobody()), pause: Err(nobody()) }
    }
}

impl Flow {
    /// Asks the kernel.
    pub(super) fn ask(interface: &str) -> Self {
        let said = |error: io::Error| error.to_string();
        Self { pfc: ask_pfc(interface).map_err(said), pause: ask_pause(interface).map_err(said) }
    }
}

impl Pause {
    pub(in crate::diagnostics) const fn is_on(self) -> bool {
        self.is_received && self.is_sent
    }
}

/// `NETLINK_ROUTE` is 0.
const ROUTE: Option<Protocol> = None;
// include/uapi/linux: netlink.h, rtnetlink.h, dcbnl.h, genetlink.h, ethtool_netlink.h.
const NLMSG_HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 1 << 15;
const RTM_GETDCB: u16 = 78;
const DCB_CMD_IEEE_GET: u8 = 21;
const DCB_ATTR_IFNAME: u16 = 1;
const DCB_ATTR_IEEE: u16 = 13;
const DCB_ATTR_IEEE_PFC: u16 = 2;
/// `struct ieee_pfc`: the priorities' bits at 1, frames sent and received for each at 8 and 72.
const IEEE_PFC_BYTES: usize = 136;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const ETHTOOL_MSG_PAUSE_GET: u8 = 21;
const ETHTOOL_A_PAUSE_HEADER: u16 = 1;
const ETHTOOL_A_HEADER_DEV_NAME: u16 = 2;
const ETHTOOL_A_HEADER_FLAGS: u16 = 3;
const ETHTOOL_FLAG_STATS: u32 = 1 << 2;
const ETHTOOL_A_PAUSE_RX: u16 = 3;
const ETHTOOL_A_PAUSE_TX: u16 = 4;
const ETHTOOL_A_PAUSE_STATS: u16 = 5;
const ETHTOOL_A_PAUSE_STAT_TX_FRAMES: u16 = 2;
const ETHTOOL_A_PAUSE_STAT_RX_FRAMES: u16 = 3;
/// Of `struct dcbmsg` and of `struct genlmsghdr`.
const FAMILY_HEADER_BYTES: usize = 4;
const PRIORITIES: usize = 8;
/// Longest answer; that of a device with every table of DCB has some 2 KiB.
const ANSWER_BYTES: usize = 32 << 10;
/// The kernel answers at once, and a driver asks its firmware.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

fn ask_pfc(interface: &str) -> io::Result<Pfc> {
    let name = attribute(DCB_ATTR_IFNAME, &text(interface));
    let answer = ask(ROUTE, RTM_GETDCB, [0, DCB_CMD_IEEE_GET, 0, 0], &name)?;
    pfc_in(&answer).ok_or_else(|| missing("the driver tells nothing of PFC"))
}

fn pfc_in(attributes: &[u8]) -> Option<Pfc> {
    let ieee = find(attributes, DCB_ATTR_IEEE)?;
    let pfc = find(ieee, DCB_ATTR_IEEE_PFC).filter(|pfc| pfc.len() >= IEEE_PFC_BYTES)?;
    let frames = |at: usize| {
        let each = pfc[at..at + PRIORITIES * 8].chunks_exact(8).map(number);
        each.fold(0_u64, |sum, count| sum.saturating_add(count.unwrap_or(0)))
    };
    let is_on = |priority: &u8| pfc[1] & (1 << priority) != 0;
    Some(Pfc {
        priorities: (0..PRIORITIES as u8).filter(is_on).collect(),
        sent_frames: frames(8),
        received_frames: frames(8 + PRIORITIES * 8),
    })
}

fn ask_pause(interface: &str) -> io::Result<Pause> {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, &text("ethtool"));
    let answer = ask(Some(netlink::GENERIC), GENL_ID_CTRL, [CTRL_CMD_GETFAMILY, 1, 0, 0], &name)?;
    let family = find(&answer, CTRL_ATTR_FAMILY_ID).and_then(|id| id.try_into().ok()).map(u16::from_ne_bytes);
    let family = family.ok_or_else(|| missing("the kernel does not tell where ethtool is asked"))?;
    let header = [
        attribute(ETHTOOL_A_HEADER_DEV_NAME, &text(interface)),
        attribute(ETHTOOL_A_HEADER_FLAGS, &ETHTOOL_FLAG_STATS.to_ne_bytes()),
    ];
    let header = attribute(ETHTOOL_A_PAUSE_HEADER | NLA_F_NESTED, &header.concat());
    let answer = ask(Some(netlink::GENERIC), family, [ETHTOOL_MSG_PAUSE_GET, 1, 0, 0], &header)?;
    pause_in(&answer).ok_or_else(|| missing("the driver tells nothing of pause frames"))
}

fn pause_in(attributes: &[u8]) -> Option<Pause> {
    let is_on = |kind| Some(*find(attributes, kind)?.first()? != 0);
    let counted = |kind| number(find(find(attributes, ETHTOOL_A_PAUSE_STATS)?, kind)?);
    Some(Pause {
        is_received: is_on(ETHTOOL_A_PAUSE_RX)?,
        is_sent: is_on(ETHTOOL_A_PAUSE_TX)?,
        sent_frames: counted(ETHTOOL_A_PAUSE_STAT_TX_FRAMES),
        received_frames: counted(ETHTOOL_A_PAUSE_STAT_RX_FRAMES),
    })
}

/// Sends one question, and returns the attributes of its answer.
fn ask(
    protocol: Option<Protocol>,
    kind: u16,
    family_header: [u8; FAMILY_HEADER_BYTES],
    attributes: &[u8],
) -> io::Result<Vec<u8>> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
    let question = question(kind, family_header, attributes);
    sendto(&socket, &question, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut ready = [PollFd::new(&socket, PollFlags::IN)];
    if poll(&mut ready, Some(&PATIENCE))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not answer within 2 s"));
    }
    let mut answer = vec![0; ANSWER_BYTES];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    attributes_in(&answer[..length.min(ANSWER_BYTES)], kind)
}

fn question(kind: u16, family_header: [u8; FAMILY_HEADER_BYTES], attributes: &[u8]) -> Vec<u8> {
    let length = NLMSG_HEADER_BYTES + FAMILY_HEADER_BYTES + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).expect("a question has less than 4 GiB").to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence and port: one question, one answer.
    message.extend([0; 8]);
    message.extend(family_header);
    message.extend(attributes);
    message
}

/// What follows the headers of the first message of an answer.
fn attributes_in(answer: &[u8], kind: u16) -> io::Result<Vec<u8>> {
    let malformed = || missing("the kernel's answer is cut off");
    let length = answer.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    let message =
        length.and_then(|length| answer.get(..usize::try_from(length).ok()?)).ok_or_else(malformed)?;
    let (header, payload) = message.split_at_checked(NLMSG_HEADER_BYTES).ok_or_else(malformed)?;
    let found = u16::from_ne_bytes([header[4], header[5]]);
    if found == NLMSG_ERROR {
        let code = payload.get(..4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(code.ok_or_else(malformed)?.saturating_neg()));
    }
    if found != kind {
        return Err(missing("the kernel answers with something else"));
    }
    Ok(payload.get(FAMILY_HEADER_BYTES..).ok_or_else(malformed)?.to_vec())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("an attribute of ours is short");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// The value of the first attribute of that kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    // Each turn takes four bytes at least.
    while let Some((header, _)) = attributes.split_at_checked(4) {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn missing(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ieee_pfc(enabled: u8, sent: &[(usize, u64)], received: &[(usize, u64)]) -> Vec<u8> {
        let mut pfc = vec![0; IEEE_PFC_BYTES];
        pfc[..2].copy_from_slice(&[8, enabled]);
        for (base, counts) in [(8, sent), (72, received)] {
            for (priority, count) in counts {
                pfc[base + priority * 8..][..8].copy_from_slice(&count.to_ne_bytes());
            }
        }
        let ieee = attribute(DCB_ATTR_IEEE | NLA_F_NESTED, &attribute(DCB_ATTR_IEEE_PFC, &pfc));
        [attribute(DCB_ATTR_IFNAME, &text("eth0")), ieee].concat()
    }

    #[test]
    fn pfc_has_its_priorities_and_the_frames_of_all_of_them() {
        let pfc = pfc_in(&ieee_pfc(0b1000, &[(3, 12), (0, 1)], &[(3, 40)])).unwrap();
        assert_eq!(pfc, Pfc { priorities: vec![3], sent_frames: 13, received_frames: 40 });
        assert_eq!(pfc_in(&ieee_pfc(0, &[], &[])), Some(Pfc::default()));
        assert_eq!(pfc_in(&attribute(DCB_ATTR_IFNAME, &text("eth0"))), None);
    }

    #[test]
    fn pause_frames_are_counted_where_the_driver_counts_them() {
        let switches = [attribute(ETHTOOL_A_PAUSE_RX, &[1]), attribute(ETHTOOL_A_PAUSE_TX, &[0])].concat();
        let pause = pause_in(&switches).unwrap();
        assert_eq!(pause, Pause { is_received: true, ..Pause::default() });
        assert!(!pause.is_on());
        let counted = [
            attribute(ETHTOOL_A_PAUSE_STAT_TX_FRAMES, &7_u64.to_ne_bytes()),
            attribute(ETHTOOL_A_PAUSE_STAT_RX_FRAMES, &9_u64.to_ne_bytes()),
        ];
        let counted = attribute(ETHTOOL_A_PAUSE_STATS | NLA_F_NESTED, &counted.concat());
        let pause = pause_in(&[switches, counted].concat()).unwrap();
        assert_eq!((pause.sent_frames, pause.received_frames), (Some(7), Some(9)));
        assert_eq!(pause_in(&[]), None);
    }

    #[test]
    fn refusal_of_the_kernel_is_its_errno() {
        let mut refusal = question(NLMSG_ERROR, (-95_i32).to_ne_bytes(), &[0; 16]);
        assert_eq!(attributes_in(&refusal, RTM_GETDCB).unwrap_err().raw_os_error(), Some(95));
        refusal.truncate(18);
        assert_eq!(attributes_in(&refusal, RTM_GETDCB).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// No driver here has either, and the kernel says so: what is asked is what it understands.
    #[test]
    fn this_kernel_understands_the_questions() {
        let flow = Flow::ask("lo");
        for told in [flow.pfc.map(|_| ()), flow.pause.map(|_| ())] {
            let told = told.unwrap_err();
            assert!(told.contains("not supported") || told.contains("os error 95"), "{told}");
        }
        let nowhere = Flow::ask("nowhere0");
        assert!(nowhere.pfc.unwrap_err().contains("os error 19"), "no such device");
        assert!(nowhere.pause.unwrap_err().contains("os error 19"), "no such device");
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = (pfc_in(&bytes), pause_in(&bytes), attributes_in(&bytes, RTM_GETDCB));
        }
    }
}
