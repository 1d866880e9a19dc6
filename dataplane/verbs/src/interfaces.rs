//! Addresses of network interfaces.
#![allow(unsafe_code, reason = "walks the list that getifaddrs makes")]

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr::NonNull;

/// Addresses of the interfaces with these names, without those of the link alone.
pub(crate) fn addresses(names: &[String]) -> Vec<IpAddr> {
    let mut start = std::ptr::null_mut();
    // SAFETY: `start` is a place for a pointer.
    if names.is_empty() || unsafe { libc::getifaddrs(&mut start) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = NonNull::new(start);
    while let Some(entry) = next {
        // SAFETY: the list came from `getifaddrs` and is freed below; each entry has a name, and
        // its address, where it has one, is of the length of its family.
        unsafe {
            let entry = entry.as_ref();
            let name = CStr::from_ptr(entry.ifa_name).to_string_lossy();
            if names.iter().any(|wanted| *wanted == name) {
                found.extend(NonNull::new(entry.ifa_addr).and_then(|address| ip(address)));
            }
            next = NonNull::new(entry.ifa_next);
        }
    }
    // SAFETY: the list came from `getifaddrs`, and nothing of it is kept.
    unsafe { libc::freeifaddrs(start) };
    found
}

/// # Safety
/// `address` must be a socket address of the family that it names.
unsafe fn ip(address: NonNull<libc::sockaddr>) -> Option<IpAddr> {
    // SAFETY: the caller vouches for it.
    match i32::from(unsafe { address.as_ref().sa_family }) {
        libc::AF_INET => {
            // SAFETY: of this family, the address is a `sockaddr_in`.
            let address = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: of this family, the address is a `sockaddr_in6`.
            let address = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            let address = Ipv6Addr::from(address.sin6_addr.s6_addr);
            (!address.is_unicast_link_local()).then_some(address.into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_has_its_address() {
        let found = addresses(&["lo".to_owned()]);
        assert!(found.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)), "{found:?}");
        assert_eq!(addresses(&["no-such-interface".to_owned()]), [] as [IpAddr; 0]);
    }
}
