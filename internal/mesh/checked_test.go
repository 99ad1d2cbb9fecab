package mesh

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestNoFieldOfAnEntryIsOverlooked when two are compared.
func TestNoFieldOfAnEntryIsOverlooked(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://corp.example/a")
	values := map[reflect.Type]any{
		reflect.TypeFor[string]():                 "x",
		reflect.TypeFor[spiffeid.ID]():            id,
		reflect.TypeFor[[]Selector]():             []Selector{{Type: "unix", Value: "uid:1"}},
		reflect.TypeFor[time.Duration]():          time.Second,
		reflect.TypeFor[[]string]():               []string{"x"},
		reflect.TypeFor[[]spiffeid.TrustDomain](): []spiffeid.TrustDomain{id.TrustDomain()},
		reflect.TypeFor[bool]():                   true,
		reflect.TypeFor[time.Time]():              time.Unix(1, 0),
		reflect.TypeFor[int64]():                  int64(1),
		reflect.TypeFor[Origin]():                 Origin{File: "x", Line: 1},
	}
	for i := range reflect.TypeFor[Entry]().NumField() {
		var a, b Entry
		f := reflect.ValueOf(&b).Elem().Field(i)
		v, ok := values[f.Type()]
		if !ok {
			t.Fatalf("no value of type %s to try", f.Type())
		}
		f.Set(reflect.ValueOf(v))
		if sameEntry(a, b) || !sameEntry(b, b) {
			t.Errorf("%s is not compared", reflect.TypeFor[Entry]().Field(i).Name)
		}
	}
}

// TestACheckThatSparesWorkFindsTheSame mistakes, hash and snapshot.
func TestACheckThatSparesWorkFindsTheSame(t *testing.T) {
	before, err := Check(parseGood(t, "full"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(p *Policies){
		"nothing":              func(*Policies) {},
		"a rule":               func(p *Policies) { p.Rules = p.Rules[1:] },
		"a bad rule":           func(p *Policies) { p.Rules[0].Effect = "permit" },
		"an entry":             func(p *Policies) { p.Entries = p.Entries[1:] },
		"their order":          func(p *Policies) { slices.Reverse(p.Entries) },
		"a selector":           func(p *Policies) { p.Entries[0].Selectors[0].Value = "uid:77" },
		"an entry of nobody":   func(p *Policies) { p.Entries[0].ParentID = spiffeid.RequireFromString("spiffe://corp.example/x") },
		"another trust domain": func(p *Policies) { p.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example") },
	} {
		p, q := parseGood(t, "full"), parseGood(t, "full")
		edit(p)
		edit(q)
		want, wantErr := Check(p, nil)
		got, err := Check(q, before)
		if wantErr != nil || err != nil {
			if wantErr == nil || err == nil || err.Error() != wantErr.Error() {
				t.Errorf("%s: %v, want %v", name, err, wantErr)
			}
			continue
		}
		if got.Hash() != want.Hash() || got.Hash() != p.Hash() {
			t.Errorf("%s: hash %s, want %s", name, got.Hash(), want.Hash())
		}
		if diff := cmp.Diff(string(want.Compile(1, 2, nil).Encode()), string(got.Compile(1, 2, nil).Encode())); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
		if other := name == "an entry" || name == "a selector" || name == "their order"; want.SameEntries(before) || got.SameEntries(before) == other {
			t.Errorf("%s: the same entries: %t", name, got.SameEntries(before))
		}
	}
}
