package mesh

import (
	"path"
	"slices"
	"strings"
)

// candidateFolder holds files of rows that are to replace those in force.
const candidateFolder = "candidate"

// Rows are the rows of both files of a set that is not in force.
type Rows struct {
	Rules       []Rule       `json:"rows"`
	Memberships []Membership `json:"groups"`
}

// WithCandidate returns the set as it would be with the rows of the candidate
// in force, nil when there is none.
func (p *Policies) WithCandidate() *Policies {
	if p.Candidate == nil {
		return nil
	}
	next := *p
	next.Rules, next.Memberships, next.Candidate = p.Candidate.Rules, p.Candidate.Memberships, nil
	return &next
}

// candidateFiles reads the folder of the candidate. A file that is not there is
// the one in force.
func (r *reader) candidateFiles(p *Policies) {
	entries, there := r.files.folders[candidateFolder]
	if !there {
		return
	}
	found := map[string]bool{}
	for _, e := range entries {
		switch name := e.Name(); {
		case aside(name):
		case e.IsDir() || name != accessFile && name != guardFile:
			r.errs = append(r.errs, &Problem{File: path.Join(candidateFolder, name), Msg: "unexpected file: a candidate has access.csv, guardrails.csv or both"})
		default:
			found[name] = true
		}
	}
	if len(found) == 0 {
		r.errs = append(r.errs, &Problem{File: candidateFolder, Msg: "folder has neither access.csv nor guardrails.csv: remove it, or write the rows to try"})
		return
	}
	next := &Policies{}
	for _, name := range []string{accessFile, guardFile} {
		if found[name] {
			r.rows(next, path.Join(candidateFolder, name), name == guardFile)
			continue
		}
		for _, rule := range p.Rules {
			if rule.Origin.File == name {
				next.Rules = append(next.Rules, rule)
			}
		}
		if name == accessFile { // guardrails define no groups
			next.Memberships = append(next.Memberships, p.Memberships...)
		}
	}
	p.Candidate = &Rows{Rules: next.Rules, Memberships: next.Memberships}
}

// rowsOfCandidate checks the candidate as if it were in force. The rest of the
// set has been found good.
func (v *validator) rowsOfCandidate() {
	next := v.p.WithCandidate()
	if next == nil {
		return
	}
	next.Entries, next.Cases, next.Admin = nil, nil, nil
	for _, p := range (&validator{p: next, partial: v.partial}).run() {
		if !strings.HasPrefix(p.File, candidateFolder+"/") {
			p.Msg += " (with the rows of the candidate)"
		}
		v.errs = append(v.errs, p)
	}
}

// tried is the snapshot of the rows of the candidate, without all that is not
// a row, nil when there is none.
func (p *Policies) tried(s *Snapshot) *Snapshot {
	if p.Candidate == nil {
		return nil
	}
	out := s.head()
	out.Revision = 0
	out.Rules, out.Memberships = slices.Clone(p.Candidate.Rules), slices.Clone(p.Candidate.Memberships)
	out.canonical()
	return out
}

// withoutOrigins returns the rows as their hash takes them.
func (r *Rows) withoutOrigins(p *Policies) *Rows {
	if r == nil {
		return nil
	}
	return &Rows{Rules: p.plainRules(r.Rules), Memberships: plainMemberships(r.Memberships)}
}
