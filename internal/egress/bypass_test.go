package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/hop"
	"sallyport/internal/meshtest"
)

// A bypass is one way that a workload may try to get past the gateway. The rows
// are those of the corpus of bypasses. Each must be refused, with one record that
// says who, and why, and without a byte on the other side.
type bypass struct {
	row  int
	what string
	// One of these is tried: a target of CONNECT, bytes in the tunnel to
	// api.stripe.test, or a request as it stands.
	target, inside, request string
	reason                  Reason // empty: any
	// answers are the addresses that the name is found at; no: limits or policy.
	answers []string
	limits  Limits
	no      bool // no policy is loaded
	// ask is tried where the gateway asks the host itself.
	ask *bypassAsk
}

// badNames answer one way for every name, as a resolver that somebody has taken
// over does.
type badNames []string

func (n badNames) Lookup(context.Context, string) ([]netip.Addr, error) {
	if len(n) == 0 {
		return nil, errors.New("the resolver does not answer")
	}
	var out []netip.Addr
	for _, a := range n {
		out = append(out, netip.MustParseAddr(a))
	}
	return out, nil
}

// bypassRows let billing out to any name under rebind.test, and to one level of
// wild.test.
const bypassRows = access + `
p, wild, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:*.wild.test, *, CONNECT, -, -, allow
`

func bypasses() []bypass {
	all := slices.Concat(bypassHellos(), bypassRequests(), bypassAsks())
	for _, c := range []struct {
		row    int
		what   string
		target string
		reason Reason
	}{
		{5, "an address of the caller's own choice", "203.0.113.66:443", ""},
		{32, "an IPv4 address", "9.9.9.9:443", ""},
		{33, "a short IPv4 address", "127.1:443", ReasonName}, {33, "a number", "2130706433:443", ReasonName},
		{33, "a hex number", "0x7f000001:443", ReasonName}, {33, "octal parts", "0177.0.0.1:443", ReasonName},
		{33, "zero", "0:443", ReasonName}, {33, "a part with a zero before it", "127.0.0.01:443", ReasonName},
		{34, "a mapped address", "[::ffff:127.0.0.1]:443", ""}, {35, "a compatible address", "[::127.0.0.1]:443", ""},
		{37, "an address of NAT64", "[64:ff9b::7f00:1]:443", ""}, {40, "a zone", "[::1%25lo]:443", ""},
		{42, "two dots at the end", "api.stripe.test..:443", ""}, {42, "a dot at the beginning", ".api.stripe.test:443", ""},
		{42, "an empty label", "api..stripe.test:443", ""}, {43, "a Cyrillic letter", "аpi.stripe.test:443", ""},
		{43, "full-width digits", "１２７.0.0.1:443", ""}, {46, "userinfo", "ok@api.stripe.test:443", ""},
		{48, "a name that only ends alike", "evilwild.test:443", "no_row"}, {48, "the apex of a wildcard", "wild.test:443", "no_row"},
		{48, "two labels for one", "a.b.wild.test:443", "no_row"}, {50, "a label of 64", strings.Repeat("a", 64) + ".wild.test:443", ""},
		{50, "a name of 254", strings.Repeat("abcdefg.", 31) + "wild.t:443", ""}, {51, "a single label", "intranet:443", ReasonName},
		{54, "the metadata address", "169.254.169.254:80", ReasonLiteral}, {57, "a port of the host itself", "127.0.0.1:15000", ""},
	} {
		all = append(all, bypass{row: c.row, what: c.what, target: c.target, reason: c.reason})
	}
	for row, list := range map[int][]string{
		53: {"10.9.9.9", "172.16.0.1", "192.168.1.1", "fd12::1", "100.64.0.1"},
		54: {"169.254.169.254", "fd00:ec2::254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"},
		55: {"0.0.0.0", "198.18.0.1", "240.0.0.1", "192.0.2.1", "192.0.0.1", "fec0::1", "100::1", "2001:db8::1", "255.255.255.255", "224.0.0.1", "ff02::1", "fe80::1"},
		56: {"127.0.0.1", "::1", "127.9.9.9"}, 34: {"::ffff:127.0.0.1"}, 35: {"::127.0.0.1"}, 37: {"64:ff9b::7f00:1", "2002:7f00:1::1"},
	} {
		for _, a := range list {
			all = append(all, bypass{row: row, what: "a name that leads to " + a, target: "x.rebind.test:443", answers: []string{a}})
		}
	}
	return append(all,
		bypass{row: 60, what: "a name that leads to bad addresses only", target: "x.rebind.test:443", answers: []string{"127.0.0.1", "10.0.0.1", "169.254.169.254"}},
		bypass{row: 63, what: "a name with bad IPv6 only", target: "x.rebind.test:443", answers: []string{"::1", "fd00::1"}},
		bypass{row: 133, what: "the resolver does not answer", target: "x.rebind.test:443", reason: ReasonResolve},
		bypass{row: 133, what: "no policy is loaded", target: "db.test:5432", reason: ReasonNoPolicy, no: true},
		bypass{row: 137, what: "more tunnels than a workload may have", target: "db.test:5432", reason: ReasonTunnelCap, limits: Limits{Tunnels: -1}},
	)
}

// bypassHellos are tried inside a tunnel that is allowed.
func bypassHellos() (all []bypass) {
	base := realHello("api.stripe.test")
	named := func(n string) string { return string(records(rebuild(base, sniBytes(n)), 16000)) }
	with := func(ext int) string {
		return string(records(rebuild(base, sniBytes("api.stripe.test"), extensionBytes(ext, []byte{0})), 16000))
	}
	add := func(row int, what, inside string, reason Reason) {
		all = append(all, bypass{row: row, what: what, inside: inside, reason: reason})
	}
	add(1, "another server name", named("evil.test"), ReasonSNI)
	add(6, "no server name", string(records(rebuild(base), 16000)), ReasonNoSNI)
	add(7, "an address as server name", named("203.0.113.7"), ReasonSNI)
	add(8, "ECH", with(extECH), ReasonECH)
	add(9, "GREASE of ECH, which looks the same", with(extECH), ReasonECH)
	add(8, "ECH of a draft", with(extECHOuter), ReasonECH)
	add(10, "ESNI", with(extEncryptedName), ReasonECH)
	add(11, "another name in records of one byte", string(records(rebuild(base, sniBytes("evil.test")), 1)), ReasonSNI)
	add(13, "a ClientHello without end", string(records([]byte{1, 1, 0, 0, 3, 3}, 16000)), ReasonHello)
	for what, n := range map[string]string{
		"a dot at the end": "api.stripe.test.", "NUL": "api.stripe.test\x00.evil.test", "a Cyrillic letter": "аpi.stripe.test",
		"a wildcard": "*.stripe.test", "a dot before it": ".api.stripe.test",
	} {
		add(15, "in the server name "+what, named(n), ReasonSNI)
	}
	add(18, "SSH", "SSH-2.0-OpenSSH_9.9\r\n", ReasonNotTLS)
	add(18, "HTTP in the clear", "GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", ReasonNotTLS)
	add(24, "early data behind another name", named("evil.test")+"\x17\x03\x03\x00\x05early", ReasonSNI)
	add(78, "CONNECT inside CONNECT", "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n", ReasonNotTLS)
	all = append(all, bypass{row: 16, what: "a ClientHello that never becomes whole", inside: named("api.stripe.test")[:60], reason: ReasonHelloTime, limits: Limits{HelloTimeout: 50 * time.Millisecond}})
	return all
}

// bypassRequests are sent as they stand, over HTTP/1.1.
func bypassRequests() (all []bypass) {
	const ok = "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: api.stripe.test:443\r\n"
	for _, c := range []struct {
		row       int
		what, req string
	}{
		{68, "the absolute form with another Host", "GET http://api.stripe.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n"},
		{68, "CONNECT with another Host", "CONNECT api.stripe.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n"},
		{69, "a path as target", "CONNECT /p HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n"},
		{69, "two slashes as target", "CONNECT //a HTTP/1.1\r\nHost: api.stripe.test:443\r\n\r\n"},
		{70, "two Hosts", ok + "Host: evil.test:443\r\n\r\n"},
		{71, "a length and chunks", ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{71, "two lengths", ok + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n"},
		{72, "a folded line", ok + "X-A: b\r\n c\r\n\r\n"},
		{72, "a bare LF", "CONNECT api.stripe.test:443 HTTP/1.1\nHost: api.stripe.test:443\n\n"},
		{72, "NUL in a field", ok + "X-A: b\x00c\r\n\r\n"},
		{72, "space before a colon", ok + "X-A : b\r\n\r\n"},
		{75, "an upgrade to h2c", "GET http://api.stripe.test/ HTTP/1.1\r\nHost: api.stripe.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"},
		{85, "TRACE", "TRACE http://api.stripe.test/ HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n"},
	} {
		all = append(all, bypass{row: c.row, what: c.what, request: c.req})
	}
	return all
}

// bypassWays are how a caller may reach the gateway.
var bypassWays = []struct {
	name string
	dial dialFunc
}{{"HTTP/1.1", dial1}, {"HTTP/2", dial2}, {"streams", dialStream}}

// try tries a bypass, and says what is wrong with what became of it.
func (b bypass) try(t *testing.T, dial dialFunc) error {
	if b.ask != nil {
		return b.tryAsk(t, dial)
	}
	w := newWorld(t, func(c *Config) {
		c.Limits = b.limits
		if b.limits.Tunnels < 0 {
			c.Limits = Limits{TunnelsPerCaller: 1}
		}
		c.Names = badNames(b.answers)
	})
	w.use(w.policy(bypassRows, ""))
	if b.no {
		w.snap.Store(nil)
	}
	inside := b.inside != ""
	if b.limits.Tunnels < 0 {
		if _, ref := dial(w, billing, b.target); ref != nil {
			return fmt.Errorf("the first tunnel was refused: %+v", ref)
		}
		inside = true
	}
	if err := b.play(t, w, dial); err != nil {
		return err
	}
	rec := w.until("a refusal", func(r audit.Record) bool { return r.Decision == audit.Deny })
	denied := 0
	for _, r := range w.audit.Records() {
		if r.Decision == audit.Deny {
			denied++
		}
		if r.Kind == audit.KindEgressOpen && !inside {
			return fmt.Errorf("a tunnel was opened: %s", w.lines())
		}
	}
	switch {
	case denied != 1:
		return fmt.Errorf("%d records of refusals: %s", denied, w.lines())
	case rec.Src != billing.String() || rec.ID == "" || rec.Reason == "" || b.reason != "" && rec.Reason != string(b.reason):
		return fmt.Errorf("recorded %+v, want the reason %q", rec, b.reason)
	}
	if b.inside != "" {
		if end := w.until("its end", kind(audit.KindEgressClose)); end.BytesUp != 0 || end.BytesDown != 0 {
			return fmt.Errorf("%d bytes went up, %d down", end.BytesUp, end.BytesDown)
		}
	}
	select {
	case n := <-w.stripe.seen:
		return fmt.Errorf("the host outside saw a hello for %q", n)
	default:
		return nil
	}
}

func (b bypass) play(t *testing.T, w *world, dial dialFunc) error {
	switch {
	case b.request != "":
		c := w.open1(billing)
		_, _ = io.WriteString(c, b.request)
		res, err := http.ReadResponse(c.br, nil)
		if err != nil {
			return err
		}
		if res.StatusCode < 400 || res.StatusCode >= 500 || res.Header.Get(decisionHeader) == "" {
			return fmt.Errorf("answered %s", res.Status)
		}
	case b.inside != "":
		got := sendHello(t, w, dial, "api.stripe.test", []byte(b.inside), 1<<20)
		if got != "" && got[0] != 21 { // an alert
			return fmt.Errorf("got %q", got)
		}
	default:
		if tun, ref := dial(w, billing, b.target); tun != nil || ref.status < 400 || ref.id == "" {
			return fmt.Errorf("got %+v", ref)
		}
	}
	return nil
}

// openRows need what a tunnel of TLS that is passed through does not show, or what
// stands elsewhere.
var openRows = []string{
	"rows 22, 23, 28 happen inside of TLS that is passed through, where nobody sees them; tls: inspect and originate leave none of it",
	"rows 25, 98 need the certificate probe, which is not built",
	"row 26 needs alpn: of a destination, which is not built",
	"row 64 needs upstream proxies, which are not built",
	"rows 27, 128 are residues: a few bits in a handshake, a byte in an hour; row 130 is tried by TestBudgetOfBytes",
	"row 20 is what proto: tcp is for: the server speaks first, under a row of name and port",
	"row 67 is tried by TestPipelinedRequestsAreJudgedOneByOne",
	"rows 122, 123, 126, 127, 134, 136 are about the host, other workloads and clocks",
}

// TestBypass tries every row of the corpus that the gateway can be asked, and
// prints the table that make bypass shows.
func TestBypass(t *testing.T) {
	var table meshtest.Bypasses
	for _, b := range bypasses() {
		ways := bypassWays
		switch {
		case b.request != "":
			ways = ways[:1]
		case b.ask != nil && b.ask.in == "":
			ways = ways[2:]
		}
		for _, way := range ways {
			if way.name == "HTTP/2" && strings.ContainsFunc(b.target, func(r rune) bool { return r > 127 || r == '@' }) {
				continue // the client here refuses to send it
			}
			t.Run(fmt.Sprintf("%d %s over %s", b.row, b.what, way.name), func(t *testing.T) {
				table.Add(t, b.row, b.what, way.name, b.try(t, way.dial))
			})
		}
	}
	table.Print(openRows...)
}

// TestBypassesWhileTunnelsAreOpen are those that need more than one step: another
// authority on a connection that has a tunnel, and a tunnel whose row goes.
func TestBypassesWhileTunnelsAreOpen(t *testing.T) {
	w := newWorld(t, nil)
	h := w.streamsOn(billing)
	tun, ref := w.connectStream(h, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	echoes(t, tun)
	if _, ref := w.connectStream(h, "evil.test:443"); ref == nil || ref.status != 403 { // row 79
		t.Errorf("another authority on the same connection: %+v", ref)
	}
	w.use(w.policy("", "")) // row 131
	w.gw.Rejudge()
	if _, err := tun.Read(make([]byte, 1)); !errors.Is(err, hop.ErrCancelled) {
		t.Errorf("a tunnel whose row is gone: %v, want a reset", err)
	}
}
