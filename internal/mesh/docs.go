package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The structs below are the YAML files as people write them.

// at is embedded in what wants to know its line.
type at struct {
	origin Origin
}

func (a *at) locate(o Origin) { a.origin = o }

// unread is true of an item that was no group of fields: a mistake by now
// reported.
func (a *at) unread() bool { return a.origin == Origin{} }

type servicesDoc struct {
	Services []serviceDoc `yaml:"services"`
}

type serviceDoc struct {
	at       `yaml:"-"`
	Name     string      `yaml:"name"`
	Identity spiffeid.ID `yaml:"identity"`
	Port     uint16      `yaml:"port"`
	Protocol string      `yaml:"protocol"`
	Stream   streamDoc   `yaml:"stream"`
	Audit    string      `yaml:"audit"`
	Fail     string      `yaml:"fail"`
}

type streamDoc struct {
	Idle  time.Duration `yaml:"idle_timeout"`
	Life  time.Duration `yaml:"max_life"`
	Proxy string        `yaml:"proxy_protocol"`
}

func (d servicesDoc) nouns() []Service {
	out := make([]Service, 0, len(d.Services))
	for _, s := range d.Services {
		if s.unread() {
			continue
		}
		if s.Protocol == "" {
			s.Protocol = HTTP
		}
		if s.Audit == AuditCounted {
			s.Audit = "" // the default, spelled out
		}
		if s.Fail == FailClosed {
			s.Fail = ""
		}
		out = append(out, Service{
			Name: ServiceName(s.Name), ID: s.Identity, Port: s.Port,
			Protocol: s.Protocol, Stream: Stream(s.Stream), Audit: s.Audit, Fail: s.Fail, Origin: s.origin,
		})
	}
	return out
}

type entriesDoc struct {
	Entries []entryDoc `yaml:"entries"`
}

type entryDoc struct {
	at            `yaml:"-"`
	ID            string        `yaml:"id"`
	SPIFFEID      spiffeid.ID   `yaml:"spiffe_id"`
	ParentID      spiffeid.ID   `yaml:"parent_id"`
	Selectors     []selectorDoc `yaml:"selectors"`
	X509TTL       time.Duration `yaml:"x509_ttl"`
	JWTTTL        time.Duration `yaml:"jwt_ttl"`
	DNSNames      []string      `yaml:"dns_names"`
	Hint          string        `yaml:"hint"`
	WeakSelectors weakSelectors `yaml:"weak_selectors"`
	Admin         bool          `yaml:"admin"`
	Downstream    bool          `yaml:"downstream"`

	FederatesWith []spiffeid.TrustDomain `yaml:"federates_with"`
}

// weakSelectors is the word "allow", and nothing else.
type weakSelectors bool

func (w *weakSelectors) UnmarshalText(text []byte) error {
	if string(text) != "allow" {
		return errWeakWord
	}
	*w = true
	return nil
}

// selectorDoc is a Selector written as text.
type selectorDoc Selector

func (s *selectorDoc) UnmarshalText(text []byte) error {
	sel, err := ParseSelector(string(text))
	*s = selectorDoc(sel)
	return err
}

func (d entriesDoc) nouns() []Entry {
	out := make([]Entry, 0, len(d.Entries))
	for _, e := range d.Entries {
		if e.unread() {
			continue
		}
		var selectors []Selector
		for _, s := range e.Selectors {
			if s != (selectorDoc{}) {
				selectors = append(selectors, Selector(s))
			}
		}
		n := Entry{
			ID: e.ID, SPIFFEID: e.SPIFFEID, ParentID: e.ParentID, Selectors: selectors,
			X509TTL: e.X509TTL, JWTTTL: e.JWTTTL, DNSNames: e.DNSNames, Hint: e.Hint,
			FederatesWith: slices.DeleteFunc(e.FederatesWith, spiffeid.TrustDomain.IsZero),
			WeakSelectors: bool(e.WeakSelectors), Admin: e.Admin, Downstream: e.Downstream, Origin: e.origin,
		}
		if n.ID == "" {
			n.ID = entryID(n)
		}
		out = append(out, n)
	}
	return out
}

// entryID is stable over restarts and over the order of selectors: 128 bits of
// the SHA-256 of parent, identity and sorted selectors.
func entryID(e Entry) string {
	sels := make([]string, len(e.Selectors))
	for i, s := range e.Selectors {
		sels[i] = s.String()
	}
	slices.Sort(sels)
	h := sha256.Sum256([]byte(e.ParentID.String() + "\n" + e.SPIFFEID.String() + "\n" + strings.Join(sels, "\n")))
	return hex.EncodeToString(h[:16])
}

type egressDoc struct {
	Destinations []destinationDoc `yaml:"destinations"`
}

type destinationDoc struct {
	at      `yaml:"-"`
	Host    string         `yaml:"host"`
	Proto   string         `yaml:"proto"`
	TLS     string         `yaml:"tls"`
	CA      string         `yaml:"ca"`
	Probe   bool           `yaml:"probe"`
	ALPN    []string       `yaml:"alpn"`
	Upgrade []string       `yaml:"upgrade"`
	Inject  *injectDoc     `yaml:"inject"`
	SNI     string         `yaml:"sni"`
	ECH     string         `yaml:"ech"`
	DNS     string         `yaml:"dns"`
	Private []netip.Prefix `yaml:"private"`
	Mode    string         `yaml:"mode"`
	Budget  budgetDoc      `yaml:"budget"`
	Route   routeDoc       `yaml:"route"`
}

type injectDoc struct {
	Secret string   `yaml:"secret"`
	Header string   `yaml:"header"`
	Prefix string   `yaml:"prefix"`
	Paths  []string `yaml:"paths"`
}

type budgetDoc struct {
	Up    int64 `yaml:"up"`
	Down  int64 `yaml:"down"`
	Conns int   `yaml:"conns"`
	Names int   `yaml:"names"`
}

type routeDoc struct {
	Endpoints      []Outlet      `yaml:"endpoints"`
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	Resilience     `yaml:",inline"`
}

func (d egressDoc) nouns() []Destination {
	out := make([]Destination, 0, len(d.Destinations))
	for _, s := range d.Destinations {
		if s.unread() {
			continue
		}
		n := Destination{
			Host: s.Host, Proto: s.Proto, TLS: s.TLS, CA: s.CA, SNI: s.SNI, DNS: s.DNS, ECH: s.ECH, Probe: s.Probe, ALPN: s.ALPN, Upgrade: s.Upgrade,
			Private:        slices.DeleteFunc(s.Private, func(p netip.Prefix) bool { return !p.IsValid() }),
			Endpoints:      s.Route.Endpoints,
			ConnectTimeout: s.Route.ConnectTimeout, Resilience: s.Route.Resilience, Mode: Mode(s.Mode), Budget: Allowance(s.Budget),
			Origin: s.origin,
		}
		if i := s.Inject; i != nil {
			n.Inject = &Inject{Secret: i.Secret, Header: i.Header, Prefix: i.Prefix, Paths: i.Paths}
		}
		switch {
		case n.Proto != "":
		case n.TLS == Originate:
			n.Proto = ProtoHTTP
		default:
			n.Proto = ProtoTLS
		}
		if n.TLS == "passthrough" {
			n.TLS = "" // which is the same
		}
		if n.DNS == "virtual" {
			n.DNS = "" // which is the same
		}
		if n.ECH == "deny" {
			n.ECH = "" // which is the same
		}
		if n.SNI == "" && n.Proto == ProtoTLS {
			n.SNI = "strict"
		}
		out = append(out, n)
	}
	return out
}

type testsDoc struct {
	Tests []caseDoc `yaml:"tests"`
}

type caseDoc struct {
	at    `yaml:"-"`
	Name  string     `yaml:"name"`
	From  string     `yaml:"from"`
	To    string     `yaml:"to"`
	Port  uint16     `yaml:"port"`
	Verb  string     `yaml:"verb"`
	Path  string     `yaml:"path"`
	SNI   string     `yaml:"sni"`
	Now   time.Time  `yaml:"now"`
	Env   string     `yaml:"env"`
	Token *CaseToken `yaml:"token"`
	Want  string     `yaml:"want"`
	Rule  string     `yaml:"rule"`
	Way   way        `yaml:"way"`
}

// way takes numbers, true and false as the text that they are written as.
type way map[string]wayText

type wayText string

func (w *wayText) UnmarshalText(text []byte) error {
	*w = wayText(text)
	return nil
}

func (w way) text() map[string]string {
	if len(w) == 0 {
		return nil
	}
	out := make(map[string]string, len(w))
	for name, value := range w {
		out[name] = string(value)
	}
	return out
}

// nouns resolves callers and ports through the services. With lenient a caller
// that is not found is left out silently: its service may stand in a file that
// could not be read.
func (d testsDoc) nouns(services []Service, lenient bool, errs *Errors) []Case {
	out := make([]Case, 0, len(d.Tests))
	for _, t := range d.Tests {
		if t.unread() {
			continue
		}
		c := Case{
			Name: t.Name, To: t.To, Port: t.Port, Verb: t.Verb, Path: t.Path,
			SNI: t.SNI, Now: t.Now, Environment: t.Env, Token: t.Token, Want: Effect(t.Want), Rule: t.Rule, Way: t.Way.text(), Origin: t.origin,
		}
		if t.From != "" {
			from, err := caller(t.From, services)
			if err != nil && !lenient {
				*errs = append(*errs, &Problem{File: t.origin.File, Line: t.origin.Line, near: "from:", Msg: err.Error()})
			}
			if err != nil {
				continue
			}
			c.From = from
		}
		if strings.HasPrefix(c.To, "host:") && c.Verb == "" && c.Path == "" {
			c.Verb, c.Path = "CONNECT", "-"
		}
		for _, s := range services {
			if c.Port == 0 && (string(s.Name) == c.To || s.ID.String() == c.To) {
				c.Port = s.Port
			}
		}
		out = append(out, c)
	}
	return out
}
