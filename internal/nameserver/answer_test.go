package nameserver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

func TestAnswers(t *testing.T) {
	r := newRig(t, nil)
	v4, v6 := r.addresses("api.example.com.")
	b4, b6 := r.addresses("billing.mesh.internal.")
	const none = "NXDOMAIN | SOA of . | EDE 18: no row lets this workload reach it"
	for _, tt := range []struct {
		why, name string
		typ       uint16
		want      string
		quick     bool
	}{
		{"an allowed name", "api.example.com.", dns.TypeA, "NOERROR | " + v4, true},
		{"its other family", "api.example.com.", dns.TypeAAAA, "NOERROR | " + v6, true},
		{"no key of ECH, no HTTP/3", "api.example.com.", dns.TypeHTTPS, "NOERROR | SOA of api.example.com.", true},
		{"nor by SVCB", "api.example.com.", dns.TypeSVCB, "NOERROR | SOA of api.example.com.", true},
		{"any other type", "api.example.com.", dns.TypeTXT, "NOERROR | SOA of api.example.com.", true},
		{"every type", "api.example.com.", dns.TypeANY, `NOERROR | "RFC8482" ""`, false},
		{"the case is kept", "aPi.ExAmple.coM.", dns.TypeA, "NOERROR | " + v4, true},
		{"the case is kept of what there is not", "aPi.ExAmple.coM.", dns.TypeHTTPS, "NOERROR | SOA of aPi.ExAmple.coM.", true},
		{"a name that no row names", "evil.example.", dns.TypeA, none, true},
		{"whatever is asked", "evil.example.", dns.TypeTXT, none, true},
		{"above an allowed name", "example.com.", dns.TypeA, none, true},
		{"below one", "x.api.example.com.", dns.TypeA, none, true},
		{"a guardrail", "bad.wild.example.com.", dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: denied by row guard-bad", true},
		{"the apex of a pattern", "wild.example.com.", dns.TypeA, none, true},
		{"two labels below a pattern", "a.b.wild.example.com.", dns.TypeA, none, true},
		{"a single label", "intranet.", dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: no row can speak of such a name", true},
		{"the root", ".", dns.TypeNS, "NXDOMAIN | SOA of . | EDE 18: no row can speak of such a name", true},
		{"what looks like an address", "203.0.113.9.", dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: no row can speak of such a name", true},
		{"a byte that no host has", `api\.example.com.`, dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: no host has such a name", true},
		{"a NUL", `\000.example.com.`, dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: no host has such a name", true},
		{"the canary of browsers", "use-application-dns.net.", dns.TypeA, "NXDOMAIN | SOA of . | EDE 15: names are asked of this server only", true},
		{"a relay", "mask.icloud.com.", dns.TypeHTTPS, "NXDOMAIN | SOA of . | EDE 15: names are asked of this server only", true},
		{"an allowed name behind a search suffix", "api.example.com.ns1.svc.cluster.local.", dns.TypeA, "NXDOMAIN | SOA of .", true},
		{"its other family", "api.example.com.cluster.local.", dns.TypeAAAA, "NXDOMAIN | SOA of .", true},
		{"a service behind a search suffix", "billing.mesh.internal.cluster.local.", dns.TypeA, "NXDOMAIN | SOA of .", true},
		{"another name behind a search suffix", "evil.example.cluster.local.", dns.TypeA, none, true},
		{"a service", "billing.mesh.internal.", dns.TypeA, "NOERROR | " + b4, true},
		{"its other family", "billing.mesh.internal.", dns.TypeAAAA, "NOERROR | " + b6, true},
		{"its port", "_http._tcp.billing.mesh.internal.", dns.TypeSRV, "NOERROR | 0 1 8443 billing.mesh.internal.", false},
		{"no address of a port", "_http._tcp.billing.mesh.internal.", dns.TypeA, "NOERROR | SOA of _http._tcp.billing.mesh.internal.", false},
		{"its endpoints", "endpoints.billing.mesh.internal.", dns.TypeA, "NOERROR | 10.0.0.7 | 10.0.0.8", false},
		{"its endpoints of the other family", "endpoints.billing.mesh.internal.", dns.TypeAAAA, "NOERROR | fd01::7", false},
		{"above services", "mesh.internal.", dns.TypeA, "NOERROR | SOA of mesh.internal.", true},
		{"above a port", "_tcp.billing.mesh.internal.", dns.TypeSRV, "NOERROR | SOA of _tcp.billing.mesh.internal.", true},
		{"a service that it does not call", "inventory.mesh.internal.", dns.TypeA, "NXDOMAIN | SOA of . | EDE 18: no row lets this workload call such a service", true},
		{"the machine itself", "localhost.", dns.TypeA, "NOERROR | 127.0.0.1", true},
		{"below it", "x.localhost.", dns.TypeAAAA, "NOERROR | ::1", true},
		{"what a virtual address stands for", reverse(t, v4), dns.TypePTR, "NOERROR | api.example.com.", false},
		{"of the other family", reverse(t, v6), dns.TypePTR, "NOERROR | api.example.com.", false},
		{"of a service", reverse(t, b4), dns.TypePTR, "NOERROR | billing.mesh.internal.", false},
		{"another address", "7.113.0.203.in-addr.arpa.", dns.TypePTR, "NXDOMAIN | SOA of .", true},
		{"a tunnel of addresses", "secret.247.in-addr.arpa.", dns.TypePTR, "NXDOMAIN | SOA of .", true},
		{"a zone transfer", "api.example.com.", dns.TypeAXFR, "REFUSED", false},
	} {
		m, quick := r.both(payment, pack(t, ask(tt.name, tt.typ, 1232)))
		if got := short(m); got != tt.want || quick != tt.quick {
			t.Errorf("%s: %s %s: %s (quick: %v)\nwant %s", tt.why, tt.name, dns.TypeToString[tt.typ], got, quick, tt.want)
		}
		if m.Question[0].Name != tt.name || !m.RecursionAvailable || m.AuthenticatedData {
			t.Errorf("%s: the answer is\n%s", tt.why, m)
		}
	}
	if got := short(first(r.both(web, pack(t, ask("api.example.com.", dns.TypeA, 1232))))); got != none {
		t.Errorf("another workload: %s", got)
	}
	if got := short(first(r.both(payment, pack(t, ask("evil.example.", dns.TypeA, 0))))); got != "NXDOMAIN | SOA of ." {
		t.Errorf("without EDNS: %s", got)
	}
}

func first(m *dns.Msg, _ bool) *dns.Msg { return m }

// addresses are those that a name is answered with.
func (r *rig) addresses(name string) (v4, v6 string) {
	r.t.Helper()
	four, _ := r.both(payment, pack(r.t, ask(name, dns.TypeA, 0)))
	six, _ := r.both(payment, pack(r.t, ask(name, dns.TypeAAAA, 0)))
	v4, v6 = strings.TrimPrefix(short(four), "NOERROR | "), strings.TrimPrefix(short(six), "NOERROR | ")
	if !netip.MustParsePrefix("247.0.0.0/8").Contains(netip.MustParseAddr(v4)) || !netip.MustParsePrefix("fd00:e::/64").Contains(netip.MustParseAddr(v6)) {
		r.t.Fatalf("%s has %s and %s", name, v4, v6)
	}
	return v4, v6
}

func reverse(t *testing.T, addr string) string {
	t.Helper()
	name, err := dns.ReverseAddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestForms has questions refused for their form, and with what.
func TestForms(t *testing.T) {
	r := newRig(t, nil)
	good := func(change func(m *dns.Msg)) []byte {
		m := ask("api.example.com.", dns.TypeA, 4096)
		change(m)
		return pack(t, m)
	}
	raw := func(change func(b []byte) []byte) []byte { return change(good(func(*dns.Msg) {})) }
	for name, tt := range map[string]struct {
		in   []byte
		want string
	}{
		"an answer":               {good(func(m *dns.Msg) { m.Response = true }), "nothing"},
		"half a header":           {[]byte{0, 1, 1, 0, 0, 1}, "nothing"},
		"no question":             {good(func(m *dns.Msg) { m.Question = nil }), "FORMERR"},
		"two questions":           {good(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), "FORMERR"},
		"a record as if answered": {good(func(m *dns.Msg) { m.Answer = []dns.RR{soa(".", true)} }), "FORMERR"},
		"an update":               {good(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), "NOTIMP"},
		"a notification":          {good(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }), "NOTIMP"},
		"another class":           {good(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), "REFUSED"},
		"any class":               {good(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }), "REFUSED"},
		// 16 is BADVERS here; the library knows one name of two.
		"EDNS 1":                 {good(func(m *dns.Msg) { m.IsEdns0().SetVersion(1) }), "BADSIG"},
		"two OPT":                {good(func(m *dns.Msg) { m.Extra = append(m.Extra, m.Extra[0]) }), "FORMERR"},
		"OPT with a name":        {good(func(m *dns.Msg) { m.IsEdns0().Hdr.Name = "a." }), "FORMERR"},
		"another record beside":  {good(func(m *dns.Msg) { m.Extra = append(m.Extra, soa(".", true)) }), "FORMERR"},
		"truncated":              {good(func(m *dns.Msg) { m.Truncated = true }), "FORMERR"},
		"OPT is asked for":       {good(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeOPT }), "FORMERR"},
		"bytes behind":           {raw(func(b []byte) []byte { return append(b, 0) }), "FORMERR"},
		"cut off":                {raw(func(b []byte) []byte { return b[:len(b)-1] }), "FORMERR"},
		"a name that points":     {raw(func(b []byte) []byte { b[12], b[13] = 0xc0, 4; return b }), "FORMERR"},
		"a label of 64":          {raw(func(b []byte) []byte { b[12] = 64; return b }), "FORMERR"},
		"a name without end":     {append(append([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, strings.Repeat("\x01a", 128)...), 0, 0, 1, 0, 1), "FORMERR"},
		"more OPT than there is": {raw(func(b []byte) []byte { b[11] = 2; return b }), "FORMERR"},
		"an option": {good(func(m *dns.Msg) {
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}}
		}), "NOERROR"},
		"a subnet": {good(func(m *dns.Msg) {
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{203, 0, 113, 0}}}
		}), "NOERROR"},
	} {
		m, _ := r.both(payment, tt.in)
		if got := short(m); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
		if m != nil && m.Id != uint16(tt.in[0])<<8|uint16(tt.in[1]) {
			t.Errorf("%s: the answer has another number", name)
		}
		if m != nil && m.IsEdns0() != nil && (m.IsEdns0().UDPSize() != maxSize || len(m.IsEdns0().Option) > 0) {
			t.Errorf("%s: EDNS says\n%s", name, m.IsEdns0())
		}
	}
	m, quick := r.both(payment, good(func(m *dns.Msg) { m.IsEdns0().SetDo(); m.AuthenticatedData, m.CheckingDisabled = true, true }))
	if !quick || !m.IsEdns0().Do() || !m.CheckingDisabled || m.AuthenticatedData {
		t.Errorf("DO and CD are kept and AD is not (quick: %v):\n%s", quick, m)
	}
}

// TestSizes has an answer that is too long cut, and whole over a stream.
func TestSizes(t *testing.T) {
	var many []netip.Addr
	for i := range 60 {
		many = append(many, netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), netip.AddrFrom16([16]byte{0x20, 1, 15: byte(i)}))
	}
	r := newRig(t, func(c *Config) {
		c.Real = func(context.Context, spiffeid.ID, string) ([]netip.Addr, time.Duration, error) {
			return many, time.Hour, nil
		}
	})
	r.zone.Load().real = []string{"real.example.com"}
	a := r.answerer(payment, 4)
	for _, tt := range []struct {
		edns   uint16
		stream bool
		most   int
		whole  bool
	}{{0, false, 512, false}, {100, false, 512, false}, {700, false, 700, false}, {4096, false, 1232, false}, {0, true, 65535, true}} {
		out, _ := a.answer(t.Context(), pack(t, ask("real.example.com.", dns.TypeAAAA, tt.edns)), tt.stream)
		m := unpack(t, out)
		if len(out) > tt.most || m.Truncated == tt.whole || len(m.Answer) == 0 || tt.whole && len(m.Answer) != 60 {
			t.Errorf("for %d: %d bytes, %d records, truncated %v", tt.edns, len(out), len(m.Answer), m.Truncated)
		}
		if m.Answer[0].Header().Ttl != 300 {
			t.Errorf("an hour is kept for %d seconds", m.Answer[0].Header().Ttl)
		}
	}
}

// TestReal has a name answered with its addresses, and with nothing made up when
// they cannot be found.
func TestReal(t *testing.T) {
	var addrs []netip.Addr
	var fails error
	r := newRig(t, func(c *Config) {
		c.Real = func(_ context.Context, who spiffeid.ID, name string) ([]netip.Addr, time.Duration, error) {
			if who != payment || name != "real.example.com" {
				t.Errorf("%s asks for %s", who, name)
			}
			return addrs, time.Second, fails
		}
	})
	r.zone.Load().real = []string{"real.example.com"}
	addrs = []netip.Addr{netip.MustParseAddr("203.0.113.7")}
	for _, tt := range []struct {
		typ  uint16
		err  error
		want string
	}{
		{dns.TypeA, nil, "NOERROR | 203.0.113.7"},
		{dns.TypeAAAA, nil, "NOERROR | SOA of rEal.example.com."},
		{dns.TypeHTTPS, nil, "NOERROR | SOA of rEal.example.com."},
		{dns.TypeA, ErrAbsent, "NXDOMAIN | SOA of ."},
		{dns.TypeA, ErrBudget, "NXDOMAIN | SOA of . | EDE 17: budget.names of the destination is used up"},
		{dns.TypeA, errors.New("down"), "SERVFAIL | EDE 23: the gateway did not look it up"},
	} {
		fails = tt.err
		m, quick := r.both(payment, pack(t, ask("rEal.example.com.", tt.typ, 1232)))
		if got := short(m); got != tt.want || quick {
			t.Errorf("%s, %v: %s, want %s", dns.TypeToString[tt.typ], tt.err, got, tt.want)
		}
	}
	fails = errTaken
	m, _ := r.both(payment, pack(t, ask("rEal.example.com.", dns.TypeA, 1232)))
	v4, _, _ := r.cfg.Book.Addresses("real.example.com")
	if got, want := short(m), "NOERROR | "+v4.String(); got != want {
		t.Errorf("when its addresses stand for another: %s, want %s", got, want)
	}
}

// TestNamesBeyondTheBudgetAreDenied, and are nowhere called allowed.
func TestNamesBeyondTheBudgetAreDenied(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Real = func(context.Context, spiffeid.ID, string) ([]netip.Addr, time.Duration, error) {
			return nil, 0, ErrBudget
		}
	})
	r.zone.Load().real = []string{"real.example.com"}
	r.both(payment, pack(t, ask("real.example.com.", dns.TypeA, 1232)))
	if got := r.recorded(); len(got) != 1 || !strings.HasPrefix(got[0], "deny host:real.example.com name_budget") {
		t.Errorf("recorded %q", got)
	}
}

func TestBudgets(t *testing.T) {
	r := newRig(t, func(c *Config) { c.PerPattern, c.Label = 2, 8 })
	get := func(name string) string {
		return short(first(r.both(payment, pack(t, ask(name, dns.TypeHTTPS, 1232)))))
	}
	for _, name := range []string{"a.wild.example.com.", "b.wild.example.com.", "a.wild.example.com."} {
		if got := get(name); !strings.HasPrefix(got, "NOERROR") {
			t.Errorf("%s: %s", name, got)
		}
	}
	for name, want := range map[string]string{
		"c.wild.example.com.":         "EDE 17: row out-wild: more than 2 names below wild.example.com in a day",
		"123456789.wild.example.com.": "EDE 17: row out-wild: a label has more than 8 characters",
	} {
		if got := get(name); got != "NXDOMAIN | SOA of . | "+want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	a := r.answerer(payment, 64)
	over := pack(t, ask("c.wild.example.com.", dns.TypeHTTPS, 1232))
	out, _ := a.answer(context.Background(), over, false)
	r.budgets[payment].since = time.Time{} // a day later
	if again, _ := a.answer(context.Background(), over, false); unpack(t, out).Rcode != dns.RcodeNameError || unpack(t, again).Rcode != dns.RcodeSuccess {
		t.Errorf("over the budget %s, a day later %s", short(unpack(t, out)), short(unpack(t, again)))
	}
	if got := get("api.example.com."); !strings.HasPrefix(got, "NOERROR") {
		t.Errorf("a name that a row writes out: %s", got)
	}
}

// TestLenientBudget has a workload that no row holds use up one budget, whatever
// the names end in.
func TestLenientBudget(t *testing.T) {
	r := newRig(t, func(c *Config) { c.PerPattern = 2 })
	snap := *testSnapshot
	snap.Modes = []mesh.FileMode{{File: "access.csv", Mode: mesh.Observe}}
	set, err := authz.Compile(&snap)
	if err != nil {
		t.Fatal(err)
	}
	r.Use(&snap, set)
	refused := 0
	for i := range 20 {
		m := first(r.both(payment, pack(t, ask(fmt.Sprintf("x.p%d.example.", i), dns.TypeHTTPS, 1232))))
		if m.Rcode == dns.RcodeNameError {
			refused++
		}
	}
	if used := len(r.budgets[payment].used); refused != 20-2*lenientFor || used != 1 {
		t.Errorf("%d names were refused, %d patterns are kept", refused, used)
	}
	b := &budget{used: map[string]int{}}
	for i := range 2 * maxPatterns {
		b.spend(fmt.Sprint(i), 1)
	}
	if len(b.used) > maxPatterns+1 {
		t.Errorf("%d patterns are kept", len(b.used))
	}
}

// TestRecords has every refusal in the log, and of what is answered the first.
func TestRecords(t *testing.T) {
	r := newRig(t, nil)
	for range 3 {
		for _, name := range []string{"api.example.com.", "evil.example.", "bad.wild.example.com.", "billing.mesh.internal.", "api.example.com.cluster.local.", "mask.icloud.com."} {
			r.both(payment, pack(t, ask(name, dns.TypeA, 0)))
		}
	}
	want := []string{
		"allow host:api.example.com rule out-api", "deny host:evil.example no_row ",
		"deny host:bad.wild.example.com rule guard-bad", "deny host:mask.icloud.com never ",
	}
	got := r.recorded()
	slices.Sort(got)
	got = slices.Compact(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("recorded\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	n := len(r.recorded())
	a, b, in := r.answerer(payment, 4), make([]byte, room), pack(t, ask("evil.example.", dns.TypeA, 0))
	for range 100 { // all of one moment are told by one
		copy(b, in)
		a.quick(b, len(in))
	}
	if more := len(r.recorded()) - n; more != 1 || !strings.HasSuffix(r.records[n].Detail, "; asked 100 times") || r.records[n].Revision != 7 || r.records[n].Src != payment.String() {
		t.Errorf("100 questions make %d records: %+v", more, r.records[n:])
	}
}

func TestQuickAllocatesNothing(t *testing.T) {
	r := newRig(t, nil)
	a := r.answerer(payment, 64)
	b := make([]byte, room)
	for _, name := range []string{"api.example.com.", "evil.example."} {
		in := pack(t, ask(name, dns.TypeA, 1232))
		if n := testing.AllocsPerRun(100, func() {
			copy(b, in)
			if size, _ := a.quick(b, len(in)); size == 0 {
				t.Fatal("it is not answered")
			}
		}); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func TestWithoutPolicy(t *testing.T) {
	r := newRig(t, nil)
	r.zone.Store(nil)
	if got := short(first(r.both(payment, pack(t, ask("api.example.com.", dns.TypeA, 1232))))); got != "SERVFAIL | EDE 14: there is no policy yet" {
		t.Error(got)
	}
}

// FuzzQuick has the quick way agree with miekg/dns on every message.
func FuzzQuick(f *testing.F) {
	r := newRig(f, nil)
	for _, name := range []string{"api.example.com.", "aPi.example.com.", "evil.example.", "x.wild.example.com.", "billing.mesh.internal.", ".", `a\000b.example.`} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeANY, dns.TypeOPT} {
			f.Add(pack(f, ask(name, typ, 0)))
			f.Add(pack(f, ask(name, typ, 1232)))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > room {
			return
		}
		one := &rig{Names: r.Names, t: t}
		one.both(payment, in)
	})
}
