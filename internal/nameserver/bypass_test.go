package nameserver

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"sallyport/internal/meshtest"
)

// A dnsBypass is a question that a workload asks to get data out, or to learn a
// way out. The row is that of the corpus.
type dnsBypass struct {
	row        int
	what, name string
	typ        uint16
	denied     bool // it is for no name that the workload may use, which is recorded
}

func dnsBypasses() []dnsBypass {
	secret := strings.Repeat("mfrggzdfmztwq2lk", 3)
	all := []dnsBypass{
		{89, "the type CNAME", "www.evil.test.", dns.TypeCNAME, true}, {89, "any type", "x.evil.test.", dns.TypeANY, true},
		{92, "a name of nobody", "x.evil.test.", dns.TypeA, true}, {92, "the same over IPv6", "x.evil.test.", dns.TypeAAAA, true},
		{90, "data in a denied name", secret + "." + secret + ".evil.test.", dns.TypeA, true},
		{90, "data in two labels for one star", secret + "." + secret + ".wild.example.com.", dns.TypeA, true},
		{90, "data in a label that is too long", secret + ".wild.example.com.", dns.TypeA, true},
		{95, "a public resolver over HTTPS", "dns.google.", dns.TypeA, true}, {95, "another one", "cloudflare-dns.com.", dns.TypeA, true},
		{95, "the name by which browsers turn DNS over HTTPS off", "use-application-dns.net.", dns.TypeA, true},
		{98, "the apex of a wildcard", "wild.example.com.", dns.TypeA, true}, {98, "a row that denies", "bad.wild.example.com.", dns.TypeA, true},
		{101, "an allowed name behind a search suffix", "api.example.com.ns1.svc.cluster.local.", dns.TypeA, false},
		{101, "a denied name behind one", "x.evil.test.cluster.local.", dns.TypeA, true},
		{102, "the name of an address outside", "7.113.0.203.in-addr.arpa.", dns.TypePTR, false},
		{102, "data in the name of an address", secret + ".in-addr.arpa.", dns.TypePTR, false},
	}
	for typ, what := range map[uint16]string{
		dns.TypeTXT: "TXT", dns.TypeNULL: "NULL", dns.TypeMX: "MX", dns.TypeCNAME: "CNAME", dns.TypeSRV: "SRV", dns.TypeNS: "NS", dns.TypeHTTPS: "HTTPS", dns.TypeSVCB: "SVCB",
	} {
		row := 89
		if typ == dns.TypeHTTPS || typ == dns.TypeSVCB {
			row = 31
		}
		all = append(all, dnsBypass{row, "the type " + what + " of a denied name", secret + ".evil.test.", typ, true}, dnsBypass{row, "the type " + what + " of an allowed one", "api.example.com.", typ, false})
	}
	return all
}

// TestBypass asks what rows of the corpus say of names. Nothing is ever asked of
// anybody else, for there is nobody that could be; each question must get an answer
// without an address, at once, and who asks for a name in vain is recorded once.
func TestBypass(t *testing.T) {
	var table meshtest.Bypasses
	for _, b := range dnsBypasses() {
		r := newRig(t, func(c *Config) { c.Label = 32 })
		table.Add(t, b.row, b.what, "DNS", b.try(r))
	}
	r := newRig(t, func(c *Config) { c.PerPattern, c.Rate = 2, 8 })
	var last *dns.Msg
	for i := range 3 {
		last, _ = r.both(payment, pack(t, ask(fmt.Sprintf("n%d.wild.example.com.", i), dns.TypeA, 1232)))
	}
	var err error
	if last.Rcode != dns.RcodeNameError || !slices.Contains(r.recorded(), "deny host:n2.wild.example.com name_budget out-wild") {
		err = fmt.Errorf("answered %s, recorded %q", short(last), r.recorded())
	}
	table.Add(t, 107, "more names below a pattern than a day has", "DNS", err)
	err = fmt.Errorf("8 questions a second are not the most")
	for a, n := r.answerer(web, 8), 0; n < 9; n++ {
		if !a.may() && n == 8 {
			err = nil
		}
	}
	table.Add(t, 91, "more questions than a second has", "DNS", err)
	table.Print("row 106 is tried by TestEgressDNS: an address of nobody leads nowhere, and no address is given twice in 30 days", "rows 99, 128: nobody upstream is asked, so that no answer can be forged; a byte an hour by allowed names is told by the ledger alone")
}

// try asks, and says what is wrong.
func (b dnsBypass) try(r *rig) error {
	m, _ := r.both(payment, pack(r.t, ask(b.name, b.typ, 1232)))
	if m == nil || m.Rcode != dns.RcodeNameError && m.Rcode != dns.RcodeSuccess || len(m.Ns) == 0 && m.Rcode == dns.RcodeNameError {
		return fmt.Errorf("no final answer: %v", m)
	}
	for _, rr := range m.Answer {
		if _, ok := rr.(*dns.HINFO); !ok { // RFC 8482
			return fmt.Errorf("answered %s", rr)
		}
	}
	denied := 0
	for _, rec := range r.recorded() {
		if strings.HasPrefix(rec, "deny ") {
			denied++
		}
	}
	if b.denied != (denied == 1) || denied > 1 {
		return fmt.Errorf("%d records of refusals: %q", denied, r.recorded())
	}
	return nil
}
