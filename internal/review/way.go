package review

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// A Way says how a call to a host outside goes out, when it may.
type Way struct {
	// Origin is where the destination is written; empty when none lists the host.
	Origin string `json:"origin,omitempty"`
	// Facts are what a test may ask for in "way", those first that say where the
	// call goes. What is not among them is none.
	Facts []Fact `json:"facts"`
}

// A Fact is one thing that is said of a Way.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// noFact is what a test writes for what is not said, setFact for a group of fields
// of which any is.
const noFact, setFact = "none", "set"

// The facts that are not fields of a destination as they stand.
const (
	// factDestination is the host of the destination that decides, factMode what
	// becomes of a denial by access.csv.
	factDestination = "destination"
	factMode        = "mode"
	// factCarries is what the call becomes at a gateway, factRefused why nothing.
	factCarries = "carries"
	factRefused = "refused"
	// factTo is where it is dialled, factThrough the proxies on the way there.
	factTo      = "to"
	factThrough = "through"
	factInject  = "inject"
)

var wayFacts = []string{factDestination, factMode, factCarries, factRefused, factTo, factThrough, factInject}

// The values of factCarries.
const (
	asTunnel   = "tunnel"
	asRequests = "requests"
)

// String says in few words how the call goes out.
func (w *Way) String() string {
	by := w.Get(factDestination)
	if w.Origin != "" {
		by += " (" + w.Origin + ")"
	}
	if why := w.Get(factRefused); why != noFact {
		return fmt.Sprintf("nothing: the gateway refuses it (%s), by destination %s", why, by)
	}
	text := fmt.Sprintf("%s to %s", w.Get(factCarries), w.Get(factTo))
	if p := w.Get(factThrough); p != noFact {
		text += " through " + p
	}
	return text + ", by destination " + by
}

// Get is one fact.
func (w *Way) Get(name string) string {
	value := noFact
	for _, f := range w.Facts {
		switch {
		case f.Name == name:
			return f.Value
		case strings.HasPrefix(f.Name, name+"."):
			value = setFact
		}
	}
	return value
}

// wayOf says how a call to a host outside goes out, nil for one inside.
func wayOf(snap *mesh.Snapshot, c *authz.Call) *Way {
	host, out := strings.CutPrefix(c.Dst, "host:")
	if !out || c.Dir != mesh.Out {
		return nil
	}
	d, listed := snap.DestinationOf(host)
	w := &Way{}
	if listed {
		w.Origin = d.Origin.String()
	} else {
		d = mesh.Destination{Proto: mesh.ProtoTLS, SNI: "strict"}
	}
	say := func(name, value string) {
		if value != "" {
			w.Facts = append(w.Facts, Fact{name, value})
		}
	}
	say(factDestination, cmp.Or(d.Host, noFact))
	say(factMode, string(snap.ModeTo(c.Dst)))
	carries, refused := asTunnel, ""
	switch {
	case !listed && net.ParseIP(host) != nil:
		refused = "ip_literal"
	case !d.Opaque():
		carries = asRequests
	case c.Verb != http.MethodConnect:
		refused = "method"
	}
	if say(factRefused, refused); refused == "" {
		say(factCarries, carries)
	}
	say(factTo, placesOf(&d, host, d.PortOf(c.Port)))
	say(factThrough, proxiesOf(&d))
	say(factInject, injected(d.Inject, c))
	w.fields(d)
	return w
}

// judgedPort is the port by which a gateway judges a call.
func judgedPort(list []mesh.Destination, c *authz.Call) uint16 {
	host, out := strings.CutPrefix(c.Dst, "host:")
	if !out || c.Port != 80 {
		return c.Port
	}
	d, _ := (&mesh.Snapshot{Destinations: list}).DestinationOf(host)
	return d.PortOf(c.Port)
}

// fields says what the destination has beside: as it is written, or as it is when
// nothing is.
func (w *Way) fields(d mesh.Destination) {
	d.Timeouts.Connect = cmp.Or(d.Timeouts.Connect, d.ConnectTimeout)
	written := fieldsOfNoun(&d)
	if d.TLS == "" && d.Proto == mesh.ProtoTLS {
		written["tls"] = "passthrough"
	}
	if d.CA != "" {
		written["ca"] = "its own"
	}
	if d.TLS != "" && len(d.ALPN) == 0 {
		written["alpn"] = mesh.ALPNHTTP1
	}
	for name, there := range map[string]bool{"breaker": d.Breaker != nil, "outlier": d.Outlier != nil} {
		set := false
		for f := range written {
			set = set || strings.HasPrefix(f, name+".")
		}
		if there && !set {
			written[name] = setFact
		}
	}
	for _, name := range sortedFields(written) {
		if head, _, _ := strings.Cut(name, "["); !slices.Contains(toldOtherwise, head) && !strings.HasPrefix(name, factInject+".") {
			w.Facts = append(w.Facts, Fact{name, written[name]})
		}
	}
}

// toldOtherwise are the fields of a destination for which there is a fact of
// another name.
var toldOtherwise = []string{"host", factMode, "endpoints", "proxies", "connect_timeout"}

// sortedFields are the names of fields, those first that say what is spoken.
func sortedFields(m map[string]string) []string {
	spoken := []string{"alpn", "tls", "proto"}
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return cmp.Or(cmp.Compare(slices.Index(spoken, b), slices.Index(spoken, a)), cmp.Compare(a, b))
	})
}

// placesOf are the endpoints, or the host itself.
func placesOf(d *mesh.Destination, host string, port uint16) string {
	if len(d.Endpoints) == 0 {
		return net.JoinHostPort(host, strconv.Itoa(int(port)))
	}
	var out []string
	for _, e := range d.Endpoints {
		text := e.Address
		if d.Weighted() {
			text += fmt.Sprintf(" weight %d", max(e.Weight, 1))
		}
		if e.Priority > 0 {
			text += fmt.Sprintf(" priority %d", e.Priority)
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func proxiesOf(d *mesh.Destination) string {
	var out []string
	for _, p := range d.Parents {
		text := p.Address
		if p.Credentials != "" {
			text += " credentials " + p.Credentials
		}
		if p.CA != "" {
			text += " ca its own"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

// injected is the credential that a request gets; of a tunnel for requests, which
// of them do.
func injected(i *mesh.Inject, c *authz.Call) string {
	switch {
	case i == nil:
		return ""
	case c.Verb == http.MethodConnect:
		return fmt.Sprintf("%s in %s for %s", i.Secret, i.Header, strings.Join(i.Paths, ", "))
	case i.For(c.Path):
		return fmt.Sprintf("%s in %s", i.Secret, i.Header)
	}
	return ""
}

// differs says what a test wants of the way that is not so, empty when all is.
func (w *Way) differs(want map[string]string) string {
	var known []string
	for _, name := range sortedFields(want) {
		if w == nil {
			return "way: only a call to a host outside has one"
		}
		if known == nil {
			known = knownFacts()
		}
		if !slices.Contains(known, name) {
			return fmt.Sprintf("way: unknown %q%s", name, mesh.DidYouMean(name, known))
		}
		if got := w.Get(name); !sameValue(want[name], got) {
			return fmt.Sprintf("way: want %s %s, got %s (destination %s)", name, want[name], got, cmp.Or(w.Origin, noFact))
		}
	}
	return ""
}

// sameValue compares two facts, however a time is written.
func sameValue(a, b string) bool {
	x, err := time.ParseDuration(a)
	if err != nil {
		return a == b
	}
	y, err := time.ParseDuration(b)
	return err == nil && x == y
}

// knownFacts are the names of all that can be said of a Way.
func knownFacts() []string {
	out := slices.Clone(wayFacts)
	fieldNames(reflect.TypeFor[mesh.Destination](), "", &out)
	for i := len(out) - 1; i >= 0; i-- {
		again := slices.Contains(out[:i], out[i])
		if again || slices.Contains(toldOtherwise, out[i]) && out[i] != factMode || strings.HasPrefix(out[i], factInject+".") {
			out = slices.Delete(out, i, i+1)
		}
	}
	return out
}

// fieldNames lists what flatten could call the fields of a type, but for those of lists.
func fieldNames(t reflect.Type, label string, out *[]string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || isText(t) {
		*out = append(*out, label)
		return
	}
	if label != "" && !slices.Contains(*out, label) {
		*out = append(*out, label)
	}
	for i := range t.NumField() {
		if l := labelOf(t.Field(i)); l == inlined {
			fieldNames(t.Field(i).Type, label, out)
		} else if l != "" {
			fieldNames(t.Field(i).Type, strings.TrimPrefix(label+"."+l, "."), out)
		}
	}
}
