package mesh

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Row writes the rule as a row of access.csv.
func (r *Rule) Row() string {
	return strings.Join([]string{"p", r.ID, string(r.Dir), r.Src, r.Dst, r.Port, r.Verb, r.Path, r.Cond, string(r.Effect)}, ", ")
}

// Writable reports why the rule cannot stand in the files of a trust domain as
// Row writes it; nil when it can, and is read back as it is.
func (r *Rule) Writable(td spiffeid.TrustDomain) error {
	rules, _, errs := parseRows("", []byte(r.Row()), false)
	if err := errs.orNil(); err != nil {
		return err
	}
	back := *r
	back.Origin = Origin{}
	if len(rules) != 1 {
		return errors.New("it is not one row")
	}
	if rules[0].Origin = (Origin{}); rules[0] != back {
		return errors.New("it is read as another row")
	}
	var all []error
	for _, c := range (&Policies{TrustDomain: td}).checkRule(back) {
		all = append(all, c.err)
	}
	return errors.Join(all...)
}

// Literal says whether a path, as it is judged, can stand in a row and matches
// itself alone there.
func Literal(path string) error {
	for seg := range strings.SplitSeq(path, "/") {
		if seg == "*" || seg == Any {
			return fmt.Errorf("the segment %q of the path is a pattern in a row", seg)
		}
	}
	if i := strings.IndexAny(path, `,"'`); i >= 0 {
		return fmt.Errorf("the path has %q, which no row can write", path[i])
	}
	return nil
}

// RuleID makes an id for a rule from the last words of its caller and its
// destination, and a number that makes it another one than those taken.
func RuleID(r *Rule, taken func(string) bool) string {
	word := func(ref string) string {
		ref = strings.TrimPrefix(ref, "host:")
		ref = ref[strings.LastIndexByte(ref, '/')+1:]
		return strings.Map(func(c rune) rune {
			if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-' {
				return c
			}
			return '-'
		}, ref[:min(len(ref), 24)])
	}
	base := strings.TrimLeft(word(r.Src)+"-"+word(r.Dst), "-._")
	if base == "" {
		base = "row"
	}
	for n := 1; ; n++ {
		id := fmt.Sprintf("%s-%d", base, n)
		if !taken(id) {
			return id
		}
	}
}
