package egress

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func ifaces(list ...string) func() ([]net.Addr, error) {
	return func() ([]net.Addr, error) {
		var out []net.Addr
		for _, s := range list {
			ip, n, err := net.ParseCIDR(s)
			if err != nil {
				return nil, err
			}
			out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return out, nil
	}
}

// Rows are those of sections B and C of the bypass corpus.
func TestScreen(t *testing.T) {
	g := &Guard{
		Interfaces: ifaces("127.0.0.1/8", "::1/128", "192.0.9.5/24", "10.1.2.3/16", "2a00:1450::5/64"),
		Forbid:     prefixes("192.0.10.7/32"),
	}
	const ok = Reason("")
	tests := []struct {
		name, addr string
		private    []netip.Prefix
		want       Reason
	}{
		{"public IPv4", "1.1.1.1", nil, ok},
		{"public IPv6", "2606:4700::1111", nil, ok},
		{"just below 10/8", "9.255.255.255", nil, ok},
		{"just above 172.16/12", "172.32.0.0", nil, ok},
		{"row 32: documentation", "203.0.113.66", nil, ReasonSpecial},
		{"row 34: mapped loopback", "::ffff:127.0.0.1", nil, ReasonLocal},
		{"row 34: mapped private", "::ffff:10.9.9.9", nil, ReasonPrivate},
		{"row 34: mapped public", "::ffff:1.1.1.1", nil, ok},
		{"row 34: mapped metadata", "::ffff:169.254.169.254", nil, ReasonMetadata},
		{"row 35: compatible loopback", "::127.0.0.1", nil, ReasonAddress},
		{"row 35: compatible public", "::1.1.1.1", nil, ReasonAddress},
		{"row 35: compatible, even when listed", "::127.0.0.2", prefixes("::127.0.0.2/128", "::/0"), ReasonAddress},
		{"row 37: NAT64 loopback", "64:ff9b::7f00:1", nil, ReasonLocal},
		{"row 37: NAT64 private", "64:ff9b::a09:909", nil, ReasonPrivate},
		{"row 37: NAT64 metadata", "64:ff9b::a9fe:a9fe", nil, ReasonMetadata},
		{"row 37: NAT64 public", "64:ff9b::101:101", nil, ok},
		{"row 37: NAT64 private that is listed", "64:ff9b::a09:909", prefixes("10.9.0.0/16"), ok},
		{"row 37: NAT64 outside the /96", "64:ff9b:0:1::101:101", nil, ReasonAddress},
		{"row 37: local NAT64", "64:ff9b:1::101:101", nil, ReasonSpecial},
		{"row 40: a zone", "fe80::1%lo", nil, ReasonAddress},
		{"row 40: a zone on loopback", "::1%lo", prefixes("::1/128"), ReasonAddress},
		{"row 40: a zone on a mapped address", "::ffff:127.0.0.1%lo", prefixes("127.0.0.1/32"), ReasonAddress},
		{"row 53: 10/8", "10.9.9.9", nil, ReasonPrivate},
		{"row 53: 10/8 that is listed", "10.9.9.9", prefixes("10.9.0.0/16"), ok},
		{"row 53: 10/8 beside the list", "10.8.9.9", prefixes("10.9.0.0/16"), ReasonPrivate},
		{"row 53: 172.16/12", "172.31.255.255", nil, ReasonPrivate},
		{"row 53: 192.168/16", "192.168.0.1", nil, ReasonPrivate},
		{"row 53: shared space", "100.64.0.1", nil, ReasonPrivate},
		{"row 53: unique local", "fd00::1", nil, ReasonPrivate},
		{"row 53: unique local that is listed", "fd00::1", prefixes("fd00::/8"), ok},
		{"row 54: the metadata address", "169.254.169.254", nil, ReasonMetadata},
		{"row 54: ... in a listed range", "169.254.169.254", prefixes("169.254.0.0/16", "0.0.0.0/0"), ReasonMetadata},
		{"row 54: ... in a listed /31", "169.254.169.254", prefixes("169.254.169.254/31"), ReasonMetadata},
		{"row 54: ... listed exactly", "169.254.169.254", prefixes("169.254.169.254/32"), ok},
		{"row 54: ECS", "169.254.170.2", nil, ReasonMetadata},
		{"row 54: AWS over IPv6", "fd00:ec2::254", prefixes("fd00::/8"), ReasonMetadata},
		{"row 54: Alibaba", "100.100.100.200", prefixes("100.64.0.0/10"), ReasonMetadata},
		{"row 54: Azure", "168.63.129.16", nil, ReasonMetadata},
		{"row 54: Oracle", "192.0.0.192", nil, ReasonMetadata},
		{"row 55: this network", "0.0.0.0", prefixes("0.0.0.0/32"), ReasonAddress},
		{"row 55: 0/8", "0.1.2.3", nil, ReasonAddress},
		{"row 55: benchmarking", "198.18.0.1", nil, ReasonSpecial},
		{"row 55: benchmarking in a listed range", "198.18.0.1", prefixes("198.18.0.0/15"), ReasonSpecial},
		{"row 55: benchmarking listed exactly", "198.18.0.1", prefixes("198.18.0.1/32"), ok},
		{"row 55: reserved", "240.0.0.1", nil, ReasonSpecial},
		{"row 55: broadcast", "255.255.255.255", prefixes("255.255.255.255/32"), ReasonAddress},
		{"row 55: multicast", "224.0.0.1", prefixes("224.0.0.1/32"), ReasonAddress},
		{"row 55: TEST-NET-1", "192.0.2.1", nil, ReasonSpecial},
		{"row 55: TEST-NET-2", "198.51.100.1", nil, ReasonSpecial},
		{"row 55: protocol assignments", "192.0.0.9", nil, ReasonSpecial},
		{"row 55: 6to4 anycast", "192.88.99.1", nil, ReasonSpecial},
		{"row 55: site local", "fec0::1", nil, ReasonSpecial},
		{"row 55: discard", "100::1", nil, ReasonSpecial},
		{"row 55: documentation v6", "2001:db8::1", nil, ReasonSpecial},
		{"row 55: documentation v6, new", "3fff::1", nil, ReasonSpecial},
		{"row 55: multicast v6", "ff02::1", prefixes("ff02::1/128"), ReasonAddress},
		{"row 55: unspecified v6", "::", prefixes("::/128"), ReasonAddress},
		{"row 55: link local v6", "fe80::1", nil, ReasonSpecial},
		{"6to4 of loopback", "2002:7f00:1::1", nil, ReasonSpecial},
		{"6to4 of a public address", "2002:101:101::1", nil, ReasonSpecial},
		{"Teredo", "2001:0:4136:e378:8000:63bf:80ff:fffe", nil, ReasonSpecial},
		{"ORCHID", "2001:20::1", nil, ReasonSpecial},
		{"segment routing", "5f00::1", nil, ReasonSpecial},
		{"outside every allocation", "4000::1", nil, ReasonAddress},
		{"outside every allocation, high", "9000::1", nil, ReasonAddress},
		{"row 56: loopback", "127.0.0.1", nil, ReasonLocal},
		{"row 56: loopback in a listed range", "127.0.0.1", prefixes("127.0.0.0/8"), ReasonLocal},
		{"row 56: loopback listed exactly", "127.0.0.1", prefixes("127.0.0.1/32"), ok},
		{"row 56: loopback that no interface has", "127.9.9.9", prefixes("127.0.0.0/8"), ReasonSpecial},
		{"row 56: loopback v6", "::1", nil, ReasonLocal},
		{"row 56: own public address", "192.0.9.5", nil, ReasonLocal},
		{"row 56: own private address in a listed range", "10.1.2.3", prefixes("10.0.0.0/8"), ReasonLocal},
		{"row 56: own private address listed exactly", "10.1.2.3", prefixes("10.1.2.3/32"), ok},
		{"row 56: own address v6", "2a00:1450::5", nil, ReasonLocal},
		{"row 56: own address inside NAT64", "64:ff9b::c000:905", nil, ReasonLocal},
		{"row 57: the control plane", "192.0.10.7", nil, ReasonForbidden},
		{"row 57: the control plane listed exactly", "192.0.10.7", prefixes("192.0.10.7/32"), ReasonForbidden},
		{"row 57: the control plane inside NAT64", "64:ff9b::c000:a07", nil, ReasonForbidden},
		{"row 63: a mapped prefix lists nothing", "10.9.9.9", prefixes("::ffff:10.0.0.0/104"), ReasonPrivate},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			check(t, g.Screen(netip.MustParseAddr(tt.addr), tt.private), tt.want)
		})
	}
	t.Run("the zero address", func(t *testing.T) { check(t, g.Screen(netip.Addr{}, nil), ReasonAddress) })
}

func check(t *testing.T, err error, want Reason) {
	t.Helper()
	var ref *Refusal
	if want == "" {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
	} else if !errors.As(err, &ref) || ref.Reason != want {
		t.Errorf("got %v, want a refusal for %s", err, want)
	}
}

func TestScreenReadsInterfacesAgain(t *testing.T) {
	list := ifaces("192.0.9.5/24")
	var fail error
	g := &Guard{Refresh: time.Nanosecond, Interfaces: func() ([]net.Addr, error) {
		if fail != nil {
			return nil, fail
		}
		return list()
	}}
	check(t, g.Screen(netip.MustParseAddr("192.0.9.6"), nil), "")
	list = ifaces("192.0.9.6/24")
	check(t, g.Screen(netip.MustParseAddr("192.0.9.6"), nil), ReasonLocal)
	check(t, g.Screen(netip.MustParseAddr("192.0.9.5"), nil), "")
	fail = errors.New("netlink is away")
	check(t, g.Screen(netip.MustParseAddr("192.0.9.5"), nil), ReasonLocal)
}

func TestScreenKnowsThisHost(t *testing.T) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	g := new(Guard)
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.(*net.IPNet).IP)
		if g.Screen(ip, prefixes("0.0.0.0/0", "::/0")) == nil {
			t.Errorf("own address %v passes", ip)
		}
	}
}

func BenchmarkScreen(b *testing.B) {
	g := new(Guard)
	a := netip.MustParseAddr("2606:4700::1111")
	b.ReportAllocs()
	for b.Loop() {
		if err := g.Screen(a, nil); err != nil {
			b.Fatal(err)
		}
	}
}
