package nameserver

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/virtual"
)

// A Result says what became of a question. The set is closed: it is a metric
// label and, of a refusal, the reason of its record, unless the policy has one.
type Result string

// The results.
const (
	Allowed Result = "allowed" // a name outside that the workload may use
	Inside  Result = "mesh"    // a name of the mesh, or of the machine itself
	Denied  Result = "denied"  // by the policy
	Search  Result = "search"  // a search suffix made a name of another one
	Badly   Result = "form"    // the question is not one that is answered
	Failed  Result = "failed"  // no answer could be given
	Dropped Result = "dropped" // too many at once
	TooMany Result = "rate"    // more than one workload may ask

	Never    Result = "never"         // names that nobody has a use for here
	NoName   Result = "name"          // no name that a host can have
	Invented Result = "name_budget"   // too many names below a pattern
	TooLong  Result = "label"         // too long a label below a pattern
	Full     Result = "address_space" // no virtual address is left
)

// A meaning is what a name stands for, whatever is asked about it.
type meaning struct {
	result Result
	absent bool // the name does not exist
	real   bool // its addresses must be looked up
	v4, v6 []netip.Addr
	ptr    string
	srv    uint16 // the port of the service, whose name follows the first two labels
	txt    string

	name   string // as it is recorded
	rule   string
	reason string
	code   uint16 // of the extended error (RFC 8914), with text
	text   string
}

// A zone is what a policy says about names. It does not change.
type zone struct {
	snap   *mesh.Snapshot
	set    *authz.Set
	search []string
	exact  map[string]bool // hosts that rows write in full
	real   []string        // patterns of hosts with real addresses
}

func newZone(snap *mesh.Snapshot, set *authz.Set, search []string) *zone {
	z := &zone{snap: snap, set: set, exact: map[string]bool{}}
	for _, s := range search {
		z.search = append(z.search, "."+strings.ToLower(strings.Trim(s, ".")))
	}
	for _, d := range snap.Destinations {
		if d.DNS == mesh.RealAddresses {
			z.real = append(z.real, d.Host)
		}
	}
	for _, h := range set.Hosts() {
		z.exact[h] = true
	}
	return z
}

// never are names by which software asks whether it should go past the DNS of
// the network, or that lead to relays which do.
var never = []string{"use-application-dns.net", "mask.icloud.com", "mask-h2.icloud.com"}

// SelfTest is a name that only a nameserver of ours answers, by a text that only
// one process knows.
const SelfTest = "selftest." + mesh.Domain

var loopback = meaning{result: Inside, v4: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}, v6: []netip.Addr{netip.IPv6Loopback()}}

// meaning finds out what a name in lower case, without the last dot, means to a
// workload.
func (n *Names) meaning(z *zone, who spiffeid.ID, name string) *meaning {
	m := n.find(z, who, name)
	m.name = name
	if n.cfg.IPv4Only {
		m.v6 = nil
	}
	return &m
}

func (n *Names) find(z *zone, who spiffeid.ID, name string) meaning {
	switch {
	case name == SelfTest:
		m := meaning{result: Inside}
		if token := n.token.Load(); token != nil {
			m.txt = *token
		}
		return m
	case name == "localhost" || strings.HasSuffix(name, ".localhost"):
		return loopback
	case strings.HasSuffix(name, ".arpa"):
		return n.reverse(name)
	case slices.Contains(never, name):
		return meaning{result: Never, absent: true, reason: string(Never), code: dns.ExtendedErrorCodeBlocked, text: "names are asked of this server only"}
	}
	if n.cfg.Mesh {
		if inside, ok := n.inside(z, name); ok {
			return inside
		}
	}
	if mesh.CheckHost(name) != nil || !strings.Contains(name, ".") {
		return n.refused(z, who, name, meaning{result: NoName, reason: string(NoName), text: "no row can speak of such a name"})
	}
	d := z.set.Resolves(who, name)
	if !d.Allow {
		text := "no row lets this workload reach it"
		if d.Rule != "" {
			text = "denied by row " + d.Rule
		}
		return n.refused(z, who, name, meaning{result: Denied, rule: d.Rule, reason: string(d.Reason), text: text})
	}
	return n.outside(z, who, name, d)
}

// outside gives a name its address that the workload may use.
func (n *Names) outside(z *zone, who spiffeid.ID, name string, d authz.Decision) meaning {
	label, parent, _ := strings.Cut(name, ".")
	invented := !z.exact[name]
	no := func(r Result, text string) meaning {
		return meaning{result: r, absent: true, rule: d.Rule, reason: string(r), code: dns.ExtendedErrorCodeFiltered, text: text}
	}
	if invented && len(label) > n.cfg.Label {
		return no(TooLong, fmt.Sprintf("row %s: a label has more than %d characters", d.Rule, n.cfg.Label))
	}
	yes := meaning{result: Allowed, rule: d.Rule, reason: string(d.Reason)}
	if n.cfg.Real != nil && z.answersReal(name) {
		yes.real = true
	}
	budget, most := n.budgetOf(who), n.cfg.PerPattern
	if d.Reason == authz.Observed || d.Reason == authz.Warned {
		parent, most = anyPattern, lenientFor*most
	}
	_, _, known := n.cfg.Book.Addresses(name)
	if invented && !known && !budget.spend(parent, most) {
		if parent == anyPattern {
			return no(Invented, fmt.Sprintf("more than %d names in a day that no row allows", most))
		}
		return no(Invented, fmt.Sprintf("row %s: more than %d names below %s in a day", d.Rule, most, parent))
	}
	v4, v6, err := n.cfg.Book.Assign(name, invented)
	if err != nil && invented && !known {
		budget.refund(parent)
	}
	if errors.Is(err, virtual.ErrYielded) {
		if yes.real {
			return yes
		}
		return meaning{result: Dropped} // who asks again asks the process that has the book
	}
	if err != nil {
		return no(Full, "no virtual address is left")
	}
	yes.v4, yes.v6 = []netip.Addr{v4}, []netip.Addr{v6}
	return yes
}

// refused is the meaning of a name that is not allowed: it does not exist. When
// a search suffix alone made it of an allowed one, nobody asked for it.
func (n *Names) refused(z *zone, who spiffeid.ID, name string, m meaning) meaning {
	m.absent, m.code = true, dns.ExtendedErrorCodeProhibited
	for _, s := range z.search {
		if rest, ok := strings.CutSuffix(name, s); ok && rest != "" {
			_, inside := n.inside(z, rest)
			if inside && n.cfg.Mesh || mesh.CheckHost(rest) == nil && z.set.Resolves(who, rest).Allow {
				return meaning{result: Search, absent: true}
			}
		}
	}
	return m
}

// inside finds a name of the mesh: of a service, of its port, of its endpoints,
// or of what stands above them.
func (n *Names) inside(z *zone, name string) (meaning, bool) {
	if name == mesh.Domain {
		return meaning{result: Inside}, true
	}
	rest, ok := strings.CutSuffix(name, "."+mesh.Domain)
	if !ok {
		return meaning{}, false
	}
	labels := strings.Split(rest, ".")
	svc, known := z.snap.Service(mesh.ServiceName(labels[len(labels)-1]))
	v4, v6, _ := n.cfg.Book.Addresses(string(svc.Name) + "." + mesh.Domain)
	yes := meaning{result: Inside}
	switch {
	case !known:
	case len(labels) == 1 && v4.IsValid():
		yes.v4, yes.v6 = []netip.Addr{v4}, []netip.Addr{v6}
		return yes, true
	case len(labels) == 2 && labels[0] == "_tcp":
		return yes, true
	case len(labels) == 3 && labels[1] == "_tcp" && len(labels[0]) > 1 && labels[0][0] == '_':
		yes.srv = svc.Port
		return yes, true
	case len(labels) == 2 && labels[0] == "endpoints" && n.cfg.Endpoints:
		for _, e := range z.snap.EndpointsOf(svc.Name) {
			if a := e.Address.Addr().Unmap(); a.Is4() {
				yes.v4 = append(yes.v4, a)
			} else {
				yes.v6 = append(yes.v6, a)
			}
		}
		yes.v4, yes.v6 = few(yes.v4), few(yes.v6)
		return yes, true
	}
	return meaning{result: Denied, absent: true, reason: string(authz.NoRow), code: dns.ExtendedErrorCodeProhibited, text: "no row lets this workload call such a service"}, true
}

// few drops what is there twice and what has no room in an answer.
func few(as []netip.Addr) []netip.Addr {
	slices.SortFunc(as, netip.Addr.Compare)
	as = slices.Compact(as)
	return as[:min(len(as), 16)]
}

// reverse finds the name that a virtual address stands for. Other addresses have
// none here.
func (n *Names) reverse(name string) meaning {
	a, ok := fromReverse(name)
	if !ok {
		return meaning{result: Inside, absent: true}
	}
	if a.IsLoopback() {
		return meaning{result: Inside, ptr: "localhost."}
	}
	if host, ok := n.cfg.Book.Name(a); ok {
		return meaning{result: Inside, ptr: host + "."}
	}
	return meaning{result: Inside, absent: true}
}

// fromReverse reads the address out of a name below in-addr.arpa or ip6.arpa.
func fromReverse(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(rest, ".")
		var b [4]byte
		if len(parts) != len(b) {
			return netip.Addr{}, false
		}
		for i, p := range parts {
			v, err := strconv.ParseUint(p, 10, 8)
			if err != nil || strconv.FormatUint(v, 10) != p {
				return netip.Addr{}, false
			}
			b[3-i] = byte(v)
		}
		return netip.AddrFrom4(b), true
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	text := []byte(strings.ReplaceAll(rest, ".", ""))
	slices.Reverse(text)
	var b [16]byte
	if k, err := hex.Decode(b[:], text[:min(32, len(text))]); err != nil || k != 16 || len(text) != 32 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom16(b), true
}

// answersReal says whether the policy has a name answered with its addresses.
func (z *zone) answersReal(name string) bool {
	return slices.ContainsFunc(z.real, func(p string) bool { return mesh.MatchHost(p, name) })
}
