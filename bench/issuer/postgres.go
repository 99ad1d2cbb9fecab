package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"sallyport/internal/store/postgrestest"
)

var errNoPostgres = errors.New("PostgreSQL is not installed")

// A postgres is a server of this run, fsync on, with an empty database.
type postgres struct {
	testing.TB // nil: what postgrestest calls of it stands below

	url      string
	cleanups []func()
}

// giveUp carries what postgrestest could not do.
type giveUp string

func startPostgres() (p *postgres, err error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if _, err := exec.LookPath("initdb"); err != nil && len(found) == 0 {
		return nil, errNoPostgres
	}
	p = &postgres{}
	defer func() {
		switch why := recover().(type) {
		case nil:
		case giveUp:
			p.close()
			err = errors.New(string(why))
		default:
			panic(why)
		}
	}()
	p.url = postgrestest.Start(p).Database(p)
	return p, nil
}

func (p *postgres) close() {
	for i := len(p.cleanups) - 1; i >= 0; i-- {
		p.cleanups[i]()
	}
	p.cleanups = nil
}

// Helper, Cleanup, Fatal and Fatalf are testing.TB.
func (p *postgres) Helper() {}

func (p *postgres) Cleanup(f func()) { p.cleanups = append(p.cleanups, f) }

func (p *postgres) Fatal(args ...any) { panic(giveUp(fmt.Sprint(args...))) }

func (p *postgres) Fatalf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	panic(giveUp("start PostgreSQL failed"))
}
