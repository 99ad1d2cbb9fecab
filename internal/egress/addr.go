package egress

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A class says what an address is for, from harmless to never dialled.
type class int

const (
	global  class = iota // public unicast
	private              // yields to a prefix of the destination that contains it
	special              // yields to an exact /32 or /128 only
	never                // nothing can be there: yields to nothing
)

type block struct {
	prefix netip.Prefix
	class  class
	what   string
}

// blocks is the IANA IPv4 and IPv6 special-purpose address registries, plus
// multicast and the ranges that carry IPv4 inside. The most specific entry
// that contains an address speaks for it.
var blocks = []block{
	{netip.MustParsePrefix("0.0.0.0/8"), never, "this network (RFC 791)"},
	{netip.MustParsePrefix("10.0.0.0/8"), private, "private use (RFC 1918)"},
	{netip.MustParsePrefix("100.64.0.0/10"), private, "shared address space (RFC 6598)"},
	{netip.MustParsePrefix("127.0.0.0/8"), special, "loopback (RFC 1122)"},
	{netip.MustParsePrefix("169.254.0.0/16"), special, "link local (RFC 3927)"},
	{netip.MustParsePrefix("172.16.0.0/12"), private, "private use (RFC 1918)"},
	{netip.MustParsePrefix("192.0.0.0/24"), special, "IETF protocol assignments (RFC 6890)"},
	{netip.MustParsePrefix("192.0.2.0/24"), special, "documentation (RFC 5737)"},
	{netip.MustParsePrefix("192.31.196.0/24"), special, "AS112 (RFC 7535)"},
	{netip.MustParsePrefix("192.52.193.0/24"), special, "AMT (RFC 7450)"},
	{netip.MustParsePrefix("192.88.99.0/24"), special, "6to4 relay anycast (RFC 7526)"},
	{netip.MustParsePrefix("192.168.0.0/16"), private, "private use (RFC 1918)"},
	{netip.MustParsePrefix("192.175.48.0/24"), special, "AS112 (RFC 7534)"},
	{netip.MustParsePrefix("198.18.0.0/15"), special, "benchmarking (RFC 2544)"},
	{netip.MustParsePrefix("198.51.100.0/24"), special, "documentation (RFC 5737)"},
	{netip.MustParsePrefix("203.0.113.0/24"), special, "documentation (RFC 5737)"},
	{netip.MustParsePrefix("224.0.0.0/4"), never, "multicast (RFC 5771)"},
	{netip.MustParsePrefix("240.0.0.0/4"), special, "reserved (RFC 1112)"},
	{netip.MustParsePrefix("255.255.255.255/32"), never, "limited broadcast (RFC 919)"},

	{netip.MustParsePrefix("::/3"), never, "not global unicast (RFC 4291)"},
	{netip.MustParsePrefix("::/96"), never, "IPv4-compatible (RFC 4291)"},
	{netip.MustParsePrefix("::/128"), never, "unspecified (RFC 4291)"},
	{netip.MustParsePrefix("::1/128"), special, "loopback (RFC 4291)"},
	{netip.MustParsePrefix("::ffff:0:0/96"), never, "IPv4-mapped (RFC 4291)"},
	{netip.MustParsePrefix("64:ff9b::/96"), global, "NAT64 (RFC 6052)"},
	{netip.MustParsePrefix("64:ff9b:1::/48"), special, "local NAT64 (RFC 8215)"},
	{netip.MustParsePrefix("100::/64"), special, "discard only (RFC 6666)"},
	{netip.MustParsePrefix("100:0:0:1::/64"), special, "dummy (RFC 9780)"},
	{netip.MustParsePrefix("2000::/3"), global, "global unicast"},
	{netip.MustParsePrefix("2001::/23"), special, "IETF protocol assignments (RFC 2928)"},
	{netip.MustParsePrefix("2001::/32"), special, "Teredo (RFC 4380)"},
	{netip.MustParsePrefix("2001:db8::/32"), special, "documentation (RFC 3849)"},
	{netip.MustParsePrefix("2002::/16"), special, "6to4 (RFC 3056)"},
	{netip.MustParsePrefix("2620:4f:8000::/48"), special, "AS112 (RFC 7534)"},
	{netip.MustParsePrefix("3fff::/20"), special, "documentation (RFC 9637)"},
	{netip.MustParsePrefix("4000::/2"), never, "not allocated (RFC 4291)"},
	{netip.MustParsePrefix("5f00::/16"), special, "segment routing SIDs (RFC 9602)"},
	{netip.MustParsePrefix("8000::/1"), never, "not allocated (RFC 4291)"},
	{netip.MustParsePrefix("fc00::/7"), private, "unique local (RFC 4193)"},
	{netip.MustParsePrefix("fe80::/10"), special, "link local (RFC 4291)"},
	{netip.MustParsePrefix("fec0::/10"), special, "site local (RFC 3879)"},
	{netip.MustParsePrefix("ff00::/8"), never, "multicast (RFC 4291)"},
}

// metadata is the hard list: where clouds hand credentials to whoever asks.
var metadata = map[netip.Addr]bool{
	netip.MustParseAddr("169.254.169.254"): true, // AWS, Google, Azure and others
	netip.MustParseAddr("169.254.170.2"):   true, // AWS ECS tasks
	netip.MustParseAddr("169.254.170.23"):  true, // AWS EKS pod identity
	netip.MustParseAddr("fd00:ec2::254"):   true, // AWS over IPv6
	netip.MustParseAddr("fd00:ec2::23"):    true, // AWS EKS pod identity over IPv6
	netip.MustParseAddr("fd20:ce::254"):    true, // Google over IPv6
	netip.MustParseAddr("fd00:42::42"):     true, // Scaleway over IPv6
	netip.MustParseAddr("100.100.100.200"): true, // Alibaba
	netip.MustParseAddr("168.63.129.16"):   true, // Azure host
	netip.MustParseAddr("192.0.0.192"):     true, // Oracle
}

// classify finds the most specific block. An address outside all of them is
// public IPv4.
func classify(a netip.Addr) (class, string) {
	c, what, bits := global, "global unicast", -1
	for _, b := range blocks {
		if b.prefix.Bits() > bits && b.prefix.Contains(a) {
			c, what, bits = b.class, b.what, b.prefix.Bits()
		}
	}
	return c, what
}

// embedded returns the IPv4 address that a carries inside, if its block says
// that packets to a end up there.
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() {
		return netip.Addr{}, false
	}
	b := a.As16()
	v4 := func(i int) (netip.Addr, bool) { return netip.AddrFrom4([4]byte(b[i : i+4])), true }
	switch binary.BigEndian.Uint16(b[:]) {
	case 0x0064: // 64:ff9b::/96, and the /96 form inside 64:ff9b:1::/48
		if b[2] == 0xff && b[3] == 0x9b {
			return v4(12)
		}
	case 0x2002:
		return v4(2)
	case 0x2001:
		if b[2] == 0 && b[3] == 0 { // Teredo: the client's address, inverted
			return netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}), true
		}
	}
	return netip.Addr{}, false
}

// A Guard decides which addresses may be dialled. The zero Guard works.
type Guard struct {
	// Forbid lists addresses that are refused whatever a destination says,
	// such as the control plane.
	Forbid []netip.Prefix
	// Interfaces lists the addresses of this host. Default: net.InterfaceAddrs.
	Interfaces func() ([]net.Addr, error)
	// Refresh is how long a list of Interfaces is good for. Default 2 s.
	Refresh time.Duration

	mu    sync.Mutex // guards what follows
	local map[netip.Addr]bool
	read  time.Time
}

// Screen returns nil when addr may be dialled for a destination that lists
// allowed as its private ranges. Otherwise the error is a *Refusal.
//
// Public unicast passes. A private address passes when a prefix of allowed
// contains it. A special-purpose, metadata or local address passes only when
// allowed names exactly it, with /32 or /128. An address with a zone,
// multicast, unspecified and IPv4-compatible addresses never pass. What an
// address carries inside is screened by the same rules.
func (g *Guard) Screen(addr netip.Addr, allowed []netip.Prefix) error {
	if !addr.IsValid() {
		return refuse(ReasonAddress, "the address is missing")
	}
	if addr.Zone() != "" {
		return refuse(ReasonAddress, "address %s has a zone; zones are not dialled", addr)
	}
	addr = addr.Unmap()
	c, what := classify(addr)
	if c == never {
		return refuse(ReasonAddress, "address %s is %s and is never dialled", addr, what)
	}
	for _, p := range g.Forbid {
		if p.Contains(addr) {
			return refuse(ReasonForbidden, "address %s is forbidden by the gateway's own configuration", addr)
		}
	}
	exact, inside := named(addr, allowed)
	if exact {
		return nil
	}
	if metadata[addr] {
		return refuse(ReasonMetadata, "address %s is a cloud metadata service; only private: [%s/%d] allows it", addr, addr, addr.BitLen())
	}
	local, err := g.isLocal(addr)
	if err != nil {
		return refuse(ReasonLocal, "the addresses of this host cannot be read: %v", err)
	}
	if local {
		return refuse(ReasonLocal, "address %s belongs to this host; only private: [%s/%d] allows it", addr, addr, addr.BitLen())
	}
	if c == special {
		return refuse(ReasonSpecial, "address %s is %s; only private: [%s/%d] allows it", addr, what, addr, addr.BitLen())
	}
	if c == private && !inside {
		return refuse(ReasonPrivate, "address %s is %s; the destination lists no private range with it", addr, what)
	}
	if in, ok := embedded(addr); ok {
		return g.Screen(in, allowed)
	}
	return nil
}

// named reports whether allowed names exactly addr, and whether any of its
// prefixes contains addr.
func named(addr netip.Addr, allowed []netip.Prefix) (exact, inside bool) {
	for _, p := range allowed {
		if p.Contains(addr) {
			inside = true
			exact = exact || p.IsSingleIP()
		}
	}
	return exact, inside
}

// isLocal reports whether addr belongs to this host. When the list cannot be
// read, the last one serves until it is ten times older than Refresh.
func (g *Guard) isLocal(addr netip.Addr) (bool, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	refresh := g.Refresh
	if refresh <= 0 {
		refresh = 2 * time.Second
	}
	now := time.Now()
	age := now.Sub(g.read)
	if g.local == nil || age >= refresh || age < 0 {
		local, err := g.readLocal()
		if err == nil {
			g.local, g.read = local, now
		} else if g.local == nil || age > 10*refresh || age < 0 {
			return false, err
		}
	}
	return g.local[addr], nil
}

func (g *Guard) readLocal() (map[netip.Addr]bool, error) {
	list := net.InterfaceAddrs
	if g.Interfaces != nil {
		list = g.Interfaces
	}
	addrs, err := list()
	if err != nil {
		return nil, err
	}
	local := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			return nil, refuse(ReasonLocal, "interface address %v has an unknown form", a)
		}
		ip, ok := netip.AddrFromSlice(n.IP)
		if !ok {
			return nil, refuse(ReasonLocal, "interface address %v is not an IP address", a)
		}
		local[ip.Unmap()] = true
	}
	return local, nil
}
