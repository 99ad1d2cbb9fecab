// Package region tells in which region an address is, by databases in MaxMind's
// format (GeoLite2, GeoIP2, DB-IP, or one's own).
package region

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/oschwald/maxminddb-golang/v2"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// Databases are the open databases by name. They are safe for concurrent use.
type Databases struct {
	log *slog.Logger
	of  map[string]*database
}

type database struct {
	file string
	was  os.FileInfo // of what was read last
	// now is held in memory as a whole: a file that somebody cuts short must not
	// end the process.
	now atomic.Pointer[maxminddb.Reader]
}

// record is what is looked at of an entry. A database of one's own has region;
// MaxMind's have the rest.
type record struct {
	Region  string `maxminddb:"region"`
	Country struct {
		Code string `maxminddb:"iso_code"`
	} `maxminddb:"country"`
	Continent struct {
		Code string `maxminddb:"code"`
	} `maxminddb:"continent"`
}

// Validate says what is wrong with files by name, each error led by the name.
func Validate(files map[string]string) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := mesh.CheckDatabaseName(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		if f := files[name]; !filepath.IsAbs(f) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path to a file of MaxMind's format", name, f))
		}
	}
	return errors.Join(errs...)
}

// Open reads all databases.
func Open(files map[string]string, log *slog.Logger) (*Databases, error) {
	d := &Databases{log: log, of: map[string]*database{}}
	for name, file := range files {
		db := &database{file: file}
		if _, err := db.read(); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		d.of[name] = db
	}
	return d, nil
}

// read reads the file anew, unless it is as it was.
func (db *database) read() (anew bool, err error) {
	st, err := os.Stat(db.file)
	if err != nil {
		return false, err
	}
	if w := db.was; w != nil && os.SameFile(w, st) && w.Size() == st.Size() && w.ModTime().Equal(st.ModTime()) {
		return false, nil
	}
	b, err := os.ReadFile(db.file)
	if err != nil {
		return false, err
	}
	r, err := maxminddb.OpenBytes(b)
	if err != nil {
		return false, fmt.Errorf("%s: %w", db.file, err)
	}
	if err := r.Verify(); err != nil {
		return false, fmt.Errorf("%s: %w", db.file, err)
	}
	db.now.Store(r)
	db.was = st
	return true, nil
}

// Region is where the database says that an address is: its region, else the
// ISO code of the country, else the code of the continent; "" when it does not
// know, or when there is no database of that name.
func (d *Databases) Region(name string, a netip.Addr) string {
	db := d.of[name]
	if db == nil {
		return ""
	}
	var r record
	if err := db.now.Load().Lookup(a.Unmap().WithZone("")).Decode(&r); err != nil {
		return ""
	}
	return cmp.Or(r.Region, r.Country.Code, r.Continent.Code)
}

// Follow reads databases again whose files change, until ctx ends. A file that
// cannot be read leaves what was read before in force.
func (d *Databases) Follow(ctx context.Context) error {
	var wg sync.WaitGroup
	errs := make(chan error, len(d.of))
	for name, db := range d.of {
		wg.Go(func() {
			errs <- daemon.Watch(ctx, db.file, 0, func() {
				switch anew, err := db.read(); {
				case err != nil:
					d.log.Error("database of regions not read; the one before stays in force", "name", name, "err", err)
				case anew:
					d.log.Info("database of regions read again", "name", name)
				}
			})
		})
	}
	wg.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}
