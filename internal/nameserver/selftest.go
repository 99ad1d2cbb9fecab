package nameserver

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/miekg/dns"
)

// probeTime bounds one question of the self-test.
const probeTime = 2 * time.Second

// Reached asks an address what only this process answers, over a socket of the
// caller's or, when that is nil, one of its own, and says why it was not this
// process that answered. What it asks for is true of one question only.
func (n *Names) Reached(ctx context.Context, from *net.UDPConn, server netip.AddrPort) error {
	if from == nil {
		var err error
		if from, err = net.ListenUDP("udp", nil); err != nil {
			return err
		}
		defer from.Close()
	}
	n.probing.Lock()
	defer n.probing.Unlock()
	token := rand.Text()
	n.token.Store(&token)
	defer n.token.Store(nil)
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
		k, by, err := from.ReadFromUDPAddrPort(in)
		if err != nil {
			return fmt.Errorf("a question to %s does not arrive here: %w", server, err)
		}
		m := new(dns.Msg)
		if !server.Addr().IsUnspecified() && netip.AddrPortFrom(by.Addr().Unmap().WithZone(""), by.Port()) != server {
			continue // nobody whom we asked
		}
		if m.Unpack(in[:k]) != nil || m.Id != q.Id || !m.Response {
			continue // of a question before
		}
		if len(m.Answer) == 1 {
			if txt, ok := m.Answer[0].(*dns.TXT); ok && len(txt.Txt) == 1 && txt.Txt[0] == token {
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

// Beside says whether some other process of the machine looks names up for
// whoever opens its socket: systemd-resolved or nscd. Its questions go past all
// rules, and a program that means harm asks it whatever nsswitch.conf says. Root
// is where the files are, "/" as a rule.
func Beside(root string) error {
	for path, how := range map[string]string{
		"run/nscd/socket":     "nscd; stop it (systemctl disable --now nscd.socket nscd)",
		"var/run/nscd/socket": "nscd; stop it (systemctl disable --now nscd.socket nscd)",
		"run/systemd/resolve/io.systemd.Resolve": "systemd-resolved; stop it (systemctl disable --now systemd-resolved), " +
			"or have the workload not see the socket (InaccessiblePaths= in its unit, and self_test: off)",
	} {
		if _, err := os.Stat(root + path); err == nil {
			return fmt.Errorf("names are looked up past the rules by whoever opens /%s, of %s", path, how)
		}
	}
	return nil
}
