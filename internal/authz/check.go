package authz

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// checkRows refuses what Casbin would load and then ignore, misread or choke
// on. The files were checked when they were parsed, but a snapshot came over a
// wire or from a disk.
func checkRows(s *mesh.Snapshot) error {
	rows := mesh.Snapshot{TrustDomain: s.TrustDomain, Rules: s.Rules, Memberships: s.Memberships, Modes: s.Modes}
	if err := rows.Validate(); err != nil {
		return err
	}
	for i := range s.Rules {
		for _, f := range rowFields(&s.Rules[i]) {
			if err := checkField(f); err != nil {
				return fmt.Errorf("row %s: field %w", s.Rules[i].ID, err)
			}
		}
	}
	return nil
}

// rowFields gives the fields of a row in the order of the model.
func rowFields(r *mesh.Rule) []string {
	return []string{r.ID, string(r.Dir), r.Src, r.Dst, r.Port, r.Verb, r.Path, r.Cond, string(r.Effect)}
}

// checkField holds for every field: Casbin trims, splits, joins and compares
// them as text, so nothing may be in them that changes by that.
func checkField(s string) error {
	if s == "" {
		return errors.New("is empty")
	}
	if s != strings.TrimSpace(s) {
		return fmt.Errorf("%q has blanks around it", s)
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f || s[i] == ',' || s[i] == '"' || s[i] == '#' {
			return fmt.Errorf("%q holds %q, which no field may", s, s[i])
		}
	}
	return nil
}

// expandGroups gives for each group the members that are not groups, sorted.
func expandGroups(ms []mesh.Membership) map[string][]string {
	direct := map[string][]string{}
	for _, m := range ms {
		direct[m.Group] = append(direct[m.Group], m.Member)
	}
	flat := make(map[string][]string, len(direct))
	for g := range direct {
		seen := map[string]bool{g: true}
		var out []string
		for rest := []string{g}; len(rest) > 0; {
			next := rest[len(rest)-1]
			rest = rest[:len(rest)-1]
			for _, m := range direct[next] {
				if seen[m] {
					continue
				}
				seen[m] = true
				if mesh.IsGroup(m) {
					rest = append(rest, m)
				} else {
					out = append(out, m)
				}
			}
		}
		slices.Sort(out)
		flat[g] = out
	}
	return flat
}
