package nameserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// probeTime bounds one question of the self-test.
const probeTime = 2 * time.Second

// Reached asks an address what only this process answers, over a socket of the
// caller's or, when that is nil, one of its own, and says why it was not this
// process that answered.
func (n *Names) Reached(ctx context.Context, from *net.UDPConn, server netip.AddrPort) error {
	if from == nil {
		var err error
		if from, err = net.ListenUDP("udp", nil); err != nil {
			return err
		}
		defer from.Close()
	}
	q := new(dns.Msg)
	q.SetQuestion(SelfTest+".", dns.TypeTXT)
	out, err := q.Pack()
	if err != nil {
		return err
	}
	until := time.Now().Add(probeTime)
	if d, ok := ctx.Deadline(); ok && d.Before(until) {
		until = d
	}
	if err := from.SetDeadline(until); err != nil {
		return err
	}
	if _, err := from.WriteToUDPAddrPort(out, server); err != nil {
		return fmt.Errorf("a question to %s is not let out: %w", server, err)
	}
	in := make([]byte, maxSize)
	for {
		k, _, err := from.ReadFromUDPAddrPort(in)
		if err != nil {
			return fmt.Errorf("a question to %s does not arrive here: %w", server, err)
		}
		m := new(dns.Msg)
		if m.Unpack(in[:k]) != nil || m.Id != q.Id || !m.Response {
			continue // of a question before
		}
		if len(m.Answer) == 1 {
			if txt, ok := m.Answer[0].(*dns.TXT); ok && len(txt.Txt) == 1 && txt.Txt[0] == n.token {
				return nil
			}
		}
		return fmt.Errorf("a question to %s is answered by somebody else", server)
	}
}

// A Resolver is what the system's resolver is told by its files.
type Resolver struct {
	Servers []netip.AddrPort
	Search  []string
}

// SystemResolver reads a file in the form of resolv.conf. Without a server in it
// the resolver asks this machine.
func SystemResolver(path string) (Resolver, error) {
	conf, err := dns.ClientConfigFromFile(path)
	if errors.Is(err, os.ErrNotExist) {
		conf, err = &dns.ClientConfig{}, nil
	}
	if err != nil {
		return Resolver{}, fmt.Errorf("read name servers: %w", err)
	}
	r := Resolver{Search: conf.Search}
	for _, s := range conf.Servers {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return Resolver{}, fmt.Errorf("read name servers: %s: %w", path, err)
		}
		r.Servers = append(r.Servers, netip.AddrPortFrom(a.WithZone(""), 53))
	}
	if len(r.Servers) == 0 {
		r.Servers = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53)}
	}
	return r, nil
}

// Beside says whether a program of the C library resolves names by asking some
// other process of the machine instead of a DNS server: systemd-resolved by way
// of nsswitch.conf, or nscd. Root is where the files are, "/" as a rule.
func Beside(root string) error {
	there := func(path string) bool {
		_, err := os.Stat(root + path)
		return err == nil
	}
	for _, nscd := range []string{"run/nscd/socket", "var/run/nscd/socket"} {
		if there(nscd) {
			return fmt.Errorf("names are looked up by nscd (/%s): stop it, or have it not keep hosts", nscd)
		}
	}
	text, err := os.ReadFile(root + "etc/nsswitch.conf")
	if err != nil || !there("run/systemd/resolve/io.systemd.Resolve") {
		return nil //nolint:nilerr // the library asks DNS servers then
	}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "hosts:" {
			continue
		}
		for _, word := range f[1:] {
			switch word {
			case "resolve":
				return errors.New(`names are looked up by systemd-resolved: write "dns" in place of "resolve" in the line "hosts:" of /etc/nsswitch.conf`)
			case "dns":
				return nil
			}
		}
	}
	return nil
}
