package audit

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/mod/sumdb/note"
)

// A goneCheck holds the evidence of what was removed from a log against who has
// signed it and against the log.
type goneCheck struct {
	signedRemoval
	// own has signed it, of a log that has its tree; of a copy it is a witness.
	own    note.Verifier
	digest hash
	// told: the log has the record of the removal.
	told bool
}

// begin reads the evidence and goes on from it. What witnesses have signed of
// less than was removed cannot be looked at any more, so that something that
// they have signed of what is left has to take its place.
func (c *confirmer) begin(path string) error {
	c.gone, c.tree = goneCheck{}, spine{}
	gone, err := kept(path)
	if err != nil || gone.removal == nil {
		return err
	}
	c.gone = goneCheck{signedRemoval: gone, own: c.own}
	if c.gone.digest, err = gone.digest(); err != nil {
		return err
	}
	e := gone.edge()
	c.tree = e.spine()
	c.claims = slices.DeleteFunc(c.claims, func(a *claim) bool {
		if a.Size < gone.Last && !a.at.IsZero() {
			c.passed = a
		}
		return a.Size < gone.Last
	})
	c.stand(gone.Until)
	return nil
}

func (g *goneCheck) line(l *read) {
	g.told = g.told || g.removal != nil && l.err == nil && tells(&l.rec, g.digest)
}

// judge adds to the verdicts what the evidence says.
func (g *goneCheck) judge(rep *Report, witnesses []string) {
	if g.removal == nil {
		return
	}
	rep.Kept = &Kept{From: g.Last + 1, Removed: g.Last, At: g.At, Rule: g.Rule}
	var err error
	if g.own != nil {
		if err = g.signedBy(g.own); err == nil && !g.told {
			rep.Completeness.fail(0, "%d records were removed, and the record of their removal is not in the log", g.Last)
		}
	} else {
		err = g.witnessed(witnesses)
	}
	var unknown *note.UnverifiedNoteError
	switch {
	case errors.As(err, &unknown) && g.own == nil:
		why := fmt.Sprintf("records before %d were removed, and no witness whose key was given has signed the evidence", g.Last+1)
		if rep.Completeness.Unconfirmed {
			rep.Completeness.Detail = why + "; " + rep.Completeness.Detail
		}
		rep.Completeness.doubt("%s", why)
	case err != nil:
		rep.Completeness.fail(0, "records before %d were removed, and the evidence has no good signature: %v", g.Last+1, err)
	}
	if err != nil || rep.Completeness.failed() {
		return
	}
	detail := rep.Kept.String()
	if rep.Completeness.Detail != "" {
		detail += "; " + rep.Completeness.Detail
	}
	rep.Completeness.Detail = detail
}

// witnessed says if one of the witnesses has signed the evidence.
func (g *goneCheck) witnessed(witnesses []string) (err error) {
	err = &note.UnverifiedNoteError{}
	for _, text := range witnesses {
		w, e := parseWitnessKey(text)
		if e != nil {
			return e
		}
		e = g.signedBy(w)
		var unknown *note.UnverifiedNoteError
		if e == nil || !errors.As(e, &unknown) {
			return e
		}
	}
	return err
}
