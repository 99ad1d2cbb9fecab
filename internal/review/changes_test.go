package review

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/mesh"
	"sallyport/policies"
)

func demo(t testing.TB) *mesh.Policies {
	t.Helper()
	p, err := mesh.ParseFS(policies.FS, domain)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestChanges(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*mesh.Policies)
		want []Change
	}{
		{"nothing", func(*mesh.Policies) {}, nil},
		{"where a service is written", func(p *mesh.Policies) { p.Services[0].Origin.Line = 99 }, nil},
		{"a row of access, which Diff compares", func(p *mesh.Policies) { p.Rules = p.Rules[1:] }, nil},
		{"a port", func(p *mesh.Policies) { p.Services[0].Port = 9443 },
			[]Change{{"service", "web", Edited, []Field{{"port", "8443", "9443"}}}}},
		{"a destination", func(p *mesh.Policies) {
			p.Destinations = append(p.Destinations, mesh.Destination{Host: "a.test", Proto: "tcp", ConnectTimeout: time.Second, Private: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
		}, []Change{{"egress destination", "a.test", Added, []Field{{"connect_timeout", "", "1s"}, {"host", "", "a.test"}, {"private", "", "10.0.0.0/8"}, {"proto", "", "tcp"}}}}},
		{"who gets an identity", func(p *mesh.Policies) {
			p.Entries[0].Selectors = append([]mesh.Selector{{Type: "unix", Value: "uid:7"}}, p.Entries[0].Selectors...)
		}, []Change{{"entry", "spiffe://demo.sallyport/ns/shop/sa/web", Edited, []Field{{"selectors", "child:true", "unix:uid:7, child:true"}}}}},
		{"the first of several tokens", func(p *mesh.Policies) {
			p.Tokens = &mesh.Tokens{APIKeyHeader: "x-key", APIKeys: []mesh.APIKey{{Name: "ci", Hashes: []string{"sha256:0123456789abcdef"}}}}
		}, []Change{
			{"API key", "ci", Added, []Field{{"hashes", "", "sha256:01234567…"}, {"name", "", "ci"}}},
			{"tokens", "settings", Edited, []Field{{"api_key_header", "", "x-key"}}},
		}},
		{"the first routes of a service", func(p *mesh.Policies) {
			p.Routes = append(slices.Clone(p.Routes), mesh.Routes{Service: "inventory", Subsets: []mesh.Subset{{Name: "v2", Labels: map[string]string{"version": "v2"}}},
				Routes: []mesh.Route{{Name: "canary", Matches: []mesh.Match{{Headers: []mesh.NamedText{{Name: "x", Text: mesh.Text{Exact: "1"}}}}}, Backends: []mesh.Backend{{Subset: "v2", Weight: 100}}}}})
		}, []Change{{"routes", "inventory", Added, []Field{
			{"routes[canary].backends[0].subset", "", "v2"}, {"routes[canary].backends[0].weight", "", "100"},
			{"routes[canary].matches[0].headers[x].exact", "", "1"}, {"routes[canary].matches[0].headers[x].name", "", "x"}, {"routes[canary].name", "", "canary"},
			{"service", "", "inventory"}, {"subsets[v2].labels.version", "", "v2"}, {"subsets[v2].name", "", "v2"}}}}},
		{"a file that is not enforced any more", func(p *mesh.Policies) {
			p.Modes = []mesh.FileMode{{File: "access.csv", Mode: mesh.Observe}}
		}, []Change{{"mode", "access.csv", Added, []Field{{"file", "", "access.csv"}, {"mode", "", "observe"}}}}},
		{"a test", func(p *mesh.Policies) { p.Cases = p.Cases[1:] },
			[]Change{{"test", "billing reaches the payment provider", Removed, nil}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			is := demo(t)
			tt.edit(is)
			got := Changes(demo(t), is)
			for i := range got {
				if got[i].What == Removed {
					got[i].Fields = nil
				}
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// Every list of the policies is compared by Diff or by Changes, those that are
// added later among them.
func TestChangesSeeEveryList(t *testing.T) {
	typ := reflect.TypeFor[mesh.Policies]()
	for i := range typ.NumField() {
		f := typ.Field(i)
		if f.Type.Kind() != reflect.Slice || labelOf(f) == "rules" || labelOf(f) == "memberships" {
			continue
		}
		var old, new mesh.Policies
		list := reflect.MakeSlice(f.Type, 1, 1)
		setFirst(list.Index(0))
		reflect.ValueOf(&new).Elem().Field(i).Set(list)
		if got := Changes(&old, &new); len(got) != 1 || got[0].What != Added {
			t.Errorf("an element of %s that was added: got %+v", f.Name, got)
		}
	}
}

// setFirst gives the first text of a struct a value.
func setFirst(v reflect.Value) {
	for i := range v.NumField() {
		if v.Field(i).Kind() == reflect.String {
			v.Field(i).SetString("x")
			return
		}
	}
}
