package main

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/translate"
)

// translation is what the policy says of the faces of the workload's service.
type translation struct {
	*translate.Translator

	mu     sync.Mutex // held while a snapshot is put in force; guards the fields below
	self   spiffeid.ID
	newest *mesh.Snapshot
}

// serve says whose service it is. Before that there is nobody to serve.
func (t *translation) serve(self spiffeid.ID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	offer, err := t.Read(translateOf(t.newest, self))
	if err == nil {
		t.self = self
		t.Use(offer)
	}
	return err
}

// translateOf is the translation of a workload's service, which is one whatever
// the route; nil when there is none.
func translateOf(snap *mesh.Snapshot, self spiffeid.ID) *mesh.Translate {
	if snap == nil || self.IsZero() {
		return nil
	}
	svc, ok := snap.ServiceByID(self)
	if !ok {
		return nil
	}
	return snap.RoutesOf(svc.Name).Translation()
}
