package mesh

import (
	"errors"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	// ErrExists is returned when what was to be made exists already.
	ErrExists = errors.New("already exists")
	// ErrReviewed is returned when a call would change what a reviewed file
	// says.
	ErrReviewed = errors.New("is written in a reviewed file: change it there")
)

// CheckEntry holds one entry of td to the rules for those of entries.yaml.
func CheckEntry(td spiffeid.TrustDomain, e Entry) error {
	v := validator{p: &Policies{TrustDomain: td, Entries: []Entry{e}}, lone: true}
	v.entries()
	return v.errs.orNil()
}

// NewEntryID is the ID of an entry that names none: the hash of parent,
// identity and selectors.
func NewEntryID(e Entry) string { return entryID(e) }

// Reviewed reports whether the entry stands in a reviewed file.
func (e Entry) Reviewed() bool { return e.Origin.File != "" }

// Says reports whether the entry says what another does, wherever that is
// written.
func (e Entry) Says(o Entry) bool {
	return e.ID == o.ID && e.SPIFFEID == o.SPIFFEID && e.ParentID == o.ParentID &&
		slices.Equal(e.Selectors, o.Selectors) && e.X509TTL == o.X509TTL && e.JWTTTL == o.JWTTTL &&
		slices.Equal(e.DNSNames, o.DNSNames) && e.Hint == o.Hint && slices.Equal(e.FederatesWith, o.FederatesWith) &&
		e.WeakSelectors == o.WeakSelectors && e.Admin == o.Admin && e.Downstream == o.Downstream &&
		e.ExpiresAt.Equal(o.ExpiresAt) && e.CreatedAt.Equal(o.CreatedAt) && e.Revision == o.Revision
}

// An EntryEdit changes one entry that is kept beside the reviewed files.
type EntryEdit struct {
	// ID of the entry to change; empty for a new one.
	ID string
	// Delete removes it. Otherwise Change is given the entry as it is, zero for
	// a new one, and returns it as it should be. It may be called again.
	Delete bool
	Change func(Entry) (Entry, error)
}

// An EntryResult is what became of an EntryEdit: the entry as it is now, or was
// before it was deleted. With ErrExists it is the one that is in the way.
type EntryResult struct {
	Entry Entry
	Err   error
}
