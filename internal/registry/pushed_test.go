package registry_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
)

func pushable(t *testing.T, revision uint64, previous, rows string) *policyset.Signed {
	t.Helper()
	s, err := policyset.New(policyset.Set{
		TrustDomain: td, Revision: revision, Previous: previous, Created: time.Unix(1_800_000_000, 0).UTC(),
		Files: []policyset.File{{Name: "access.csv", Data: []byte(rows)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestPush(t *testing.T) {
	in := start(t)
	in.check = func(p *mesh.Policies) error {
		if len(p.Rules) > 1 {
			return errors.New("a red case")
		}
		return nil
	}
	push := func(s *policyset.Signed) error { return in.PushPolicies(t.Context(), s) }
	must := func(s *policyset.Signed) {
		t.Helper()
		if err := push(s); err != nil {
			t.Fatal(err)
		}
	}
	first := pushable(t, 1, "", "# first\n")
	second := pushable(t, 2, first.Hash(), "# second\n")
	must(first)
	must(second)
	must(second) // its reply was lost
	deny := "p, a, in, **, **, *, *, **, -, deny\n"
	for _, tt := range []struct {
		name string
		set  *policyset.Signed
		want string
		is   error
	}{
		{"an older set", first, "revision 1, in force is revision 2", registry.ErrStale},
		{"another set of the same revision", pushable(t, 2, first.Hash(), "# other\n"), "revision 2, in force is revision 2", registry.ErrStale},
		{"a set that does not follow", pushable(t, 3, first.Hash(), "# third\n"), "follows on set " + first.Hash() + ", in force is " + second.Hash(), registry.ErrStale},
		{"a set that follows on nothing", pushable(t, 3, "", "# third\n"), "follows on set none, in force is " + second.Hash(), registry.ErrStale},
		{"a set after which there is none", pushable(t, policyset.MaxRevision, second.Hash(), "# third\n"), "too far above 2", registry.ErrUnfit},
		{"a bad row", pushable(t, 3, second.Hash(), "# third\np, a, in\n"), "access.csv:2", registry.ErrUnfit},
		{"a red case", pushable(t, 3, second.Hash(), deny+strings.Replace(deny, " a,", " b,", 1)), "a red case", registry.ErrUnfit},
	} {
		err := push(tt.set)
		if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if st := in.Status(); st.PolicyRevision != 2 || st.PolicySet != second.Hash() {
			t.Errorf("%s: in force is revision %d, %s", tt.name, st.PolicyRevision, st.PolicySet)
		}
	}
	in.stop()
	in.restart()
	if st := in.Status(); st.PolicyRevision != 2 || st.PolicySet != second.Hash() {
		t.Errorf("after a restart in force is revision %d, %s", st.PolicyRevision, st.PolicySet)
	}
	third := pushable(t, 30, second.Hash(), deny)
	must(third)
	must(pushable(t, 31, third.Hash(), "# fourth\n"))
	if b, err := in.PolicySet(t.Context(), 0); err != nil || string(b) != string(third.Encode()) {
		t.Errorf("the set before that in force: %v", err)
	}
	if b, err := in.PolicySet(t.Context(), 2); err != nil || string(b) != string(second.Encode()) {
		t.Errorf("the second set: %v", err)
	}
	if _, err := in.PolicySet(t.Context(), 1); !errors.Is(err, mesh.ErrNotFound) || !strings.Contains(err.Error(), "kept are: 2, 30, 31") {
		t.Errorf("the fourth before that in force: %v", err)
	}
}
