package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks the routes that are ours (RTA protocol), so that nobody
// else's is removed. It is none of those in iproute2's rt_protos.
const routeProtocol = 83

// loopback is the number of the interface lo in every network namespace.
const loopback = 1

// virtualOf are the ranges of a configuration with defaults.
func virtualOf(c Config) []netip.Prefix { return []netip.Prefix{c.Virtual, c.Virtual6} }

// routes are the ranges that lead to loopback: without a route a program gets
// no connection out of the door, and with it no packet for a name leaves the
// machine when the rules are gone. In a namespace of its own the workload has
// no other way than loopback.
func (r *Rules) routes() []netip.Prefix {
	if r.isolated {
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	return r.virtual
}

// sourceFor is the address that connections to the range come from.
func sourceFor(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// addRoutes makes the routes and returns those that were not there. A machine
// without IPv6 gets none of that family: nothing can be sent there.
func addRoutes(ps []netip.Prefix) (added []netip.Prefix, err error) {
	for _, p := range ps {
		if p.Addr().Is6() && !hasIPv6() {
			continue
		}
		err := route(unix.RTM_NEWROUTE, netlink.Create|netlink.Excl, p)
		switch {
		case errors.Is(err, unix.EEXIST):
		case err != nil:
			return nil, errors.Join(fmt.Errorf("capture: route %s to loopback: %w", p, denied(err)), delRoutes(added))
		default:
			added = append(added, p)
		}
	}
	return added, nil
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// delRoutes removes the routes that are ours; those that are gone are no error.
func delRoutes(ps []netip.Prefix) error {
	var errs []error
	for _, p := range ps {
		if err := route(unix.RTM_DELROUTE, 0, p); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("capture: remove the route of %s: %w", p, denied(err)))
		}
	}
	return errors.Join(errs...)
}

// route sends one message about a local route (linux/rtnetlink.h, rtmsg).
func route(typ netlink.HeaderType, flags netlink.HeaderFlags, p netip.Prefix) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	family := byte(unix.AF_INET)
	if p.Addr().Is6() {
		family = unix.AF_INET6
	}
	head := []byte{family, byte(p.Bits()), 0, 0, unix.RT_TABLE_LOCAL, routeProtocol, unix.RT_SCOPE_HOST, unix.RTN_LOCAL, 0, 0, 0, 0}
	attrs := []netlink.Attribute{{Type: unix.RTA_OIF, Data: native32(loopback)}}
	if p.Bits() > 0 {
		attrs = append(attrs, netlink.Attribute{Type: unix.RTA_DST, Data: p.Addr().AsSlice()})
	}
	if typ == unix.RTM_NEWROUTE {
		attrs = append(attrs, netlink.Attribute{Type: unix.RTA_PREFSRC, Data: sourceFor(p).AsSlice()})
	}
	body, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return err
	}
	_, err = c.Execute(netlink.Message{Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Acknowledge | flags}, Data: append(head, body...)})
	return err
}

// routesThere are those of the ranges that lead to loopback by a route of ours.
func routesThere(ps []netip.Prefix) (there []string, err error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("capture: list the routes: %w", err)
	}
	defer c.Close()
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		got, err := c.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump},
			Data:   []byte{family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		})
		if err != nil {
			return nil, fmt.Errorf("capture: list the routes: %w", err)
		}
		for _, m := range got {
			if len(m.Data) < 12 || m.Data[5] != routeProtocol || m.Data[7] != unix.RTN_LOCAL {
				continue
			}
			for _, p := range ps {
				if m.Data[0] == family && int(m.Data[1]) == p.Bits() && leadsTo(m.Data[12:], p) {
					there = append(there, p.String())
				}
			}
		}
	}
	return there, nil
}

func leadsTo(attrs []byte, p netip.Prefix) bool {
	ad, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return false
	}
	for ad.Next() {
		if ad.Type() == unix.RTA_DST {
			a, ok := netip.AddrFromSlice(ad.Bytes())
			return ok && a == p.Addr()
		}
	}
	return false
}

// LoopbackUp brings the interface lo up, which a new network namespace has down.
func LoopbackUp() error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	defer c.Close()
	// struct ifinfomsg: family, padding, type, index, flags, which of them change.
	msg := []byte{unix.AF_UNSPEC, 0, 0, 0}
	msg = append(msg, native32(loopback)...)
	msg = append(msg, native32(unix.IFF_UP)...)
	msg = binary.NativeEndian.AppendUint32(msg, unix.IFF_UP)
	if _, err := c.Execute(netlink.Message{Header: netlink.Header{Type: unix.RTM_NEWLINK, Flags: netlink.Request | netlink.Acknowledge}, Data: msg}); err != nil {
		return fmt.Errorf("bring loopback up: %w", denied(err))
	}
	return nil
}
