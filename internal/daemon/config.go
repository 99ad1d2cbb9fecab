package daemon

import (
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// envPrefix starts the name of every environment variable that is ours.
const envPrefix = "SALLYPORT_"

// orchestrator matches the variables that Kubernetes puts into every container
// for a Service whose name starts with "sallyport". They are not settings.
var orchestrator = regexp.MustCompile(`_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)

// LoadConfig fills v, a pointer to the Config struct of a process, from three
// places, each over the one before: the YAML file (none when file is ""), the
// environment (SALLYPORT_LISTEN_ADDRESS sets listen.address), and flags, keyed
// by field path. It is strict: an unknown field, variable or flag is an error.
// When v has Validate() error, its verdict is the last word.
//
// Every error is for a person, says what would be right, and has the exit code
// Usage. Values of fields tagged `secret:"true"` are never part of one.
func LoadConfig(file string, env []string, flags map[string]string, v any) error {
	if err := loadConfig(file, env, flags, v); err != nil {
		return Exit(Usage, err)
	}
	return nil
}

func loadConfig(file string, env []string, flags map[string]string, v any) error {
	if file != "" {
		src, err := readConfig(file)
		if err != nil {
			return err
		}
		if err := mesh.DecodeYAML(file, src, v); err != nil {
			return err
		}
	}
	fields, err := settable(v)
	if err != nil {
		return err
	}
	var errs []error
	for name, value := range variables(env) {
		f, ok := fields[strings.ToLower(strings.TrimPrefix(name, envPrefix))]
		if !ok {
			errs = append(errs, Hint(fmt.Errorf("environment variable %s names no setting", name),
				"unset it, or pick a field that `config show` lists"))
			continue
		}
		if err := f.set(value); err != nil {
			errs = append(errs, fmt.Errorf("environment variable %s: %w", name, err))
		}
	}
	for _, path := range slices.Sorted(maps.Keys(flags)) {
		f, ok := fields[strings.NewReplacer(".", "_", "-", "_").Replace(path)]
		if !ok {
			errs = append(errs, Hint(fmt.Errorf("flag %s names no setting", path), "pick a field that `config show` lists"))
			continue
		}
		if err := f.set(flags[path]); err != nil {
			errs = append(errs, fmt.Errorf("flag %s: %w", path, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if c, ok := v.(interface{ Validate() error }); ok {
		if err := c.Validate(); err != nil {
			if file == "" {
				return err
			}
			return eachIn(file, err)
		}
	}
	return nil
}

// eachIn puts the file's name before every one of joined errors, each of which
// is a line of its own.
func eachIn(file string, err error) error {
	j, ok := err.(interface{ Unwrap() []error })
	if !ok || errors.Join(j.Unwrap()...).Error() != err.Error() { // a sentence with several causes
		return fmt.Errorf("%s: %w", file, err)
	}
	var errs []error
	for _, e := range j.Unwrap() {
		errs = append(errs, eachIn(file, e))
	}
	return errors.Join(errs...)
}

// readConfig reads a configuration file. A mebibyte is far beyond any real one
// and keeps a wrong path, such as a disk image, from filling memory.
func readConfig(file string) ([]byte, error) {
	const most = 1 << 20
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, Hint(fmt.Errorf("read config %s: no such file", file), "create it, or name the right one with --config")
	case err != nil:
		return nil, fmt.Errorf("read config %s: %w", file, cause(err))
	case !info.Mode().IsRegular():
		return nil, Hint(fmt.Errorf("read config %s: not a regular file", file), "name a YAML file with --config")
	case info.Size() > most:
		return nil, Hint(fmt.Errorf("read config %s: %d bytes are more than the limit of %d", file, info.Size(), most), "name a YAML file with --config")
	}
	src, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrPermission) {
		return nil, Hint(fmt.Errorf("read config %s: permission denied", file), fmt.Sprintf("let uid %d read it", os.Geteuid()))
	}
	if err != nil {
		return nil, fmt.Errorf("read config %s: %w", file, cause(err))
	}
	return src, nil
}

// variables returns our environment variables in the order of their names; as
// in a shell, the last of two with one name counts.
func variables(env []string) func(yield func(name, value string) bool) {
	ours := make(map[string]string)
	for _, kv := range env {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || !strings.HasPrefix(name, envPrefix) || orchestrator.MatchString(name) ||
			strings.HasSuffix(name, "_PORT") && strings.Contains(value, "://") {
			continue
		}
		ours[name] = value
	}
	return func(yield func(string, string) bool) {
		for _, name := range slices.Sorted(maps.Keys(ours)) {
			if !yield(name, ours[name]) {
				return
			}
		}
	}
}

// A field is one place in the Config struct that text can set.
type field struct {
	path   string
	value  reflect.Value
	secret bool
}

// settable lists the fields of v by path, in lower case with "_" between the
// parts. Lists of structs and maps cannot be set from text and are left out.
func settable(v any) (map[string]field, error) {
	p := reflect.ValueOf(v)
	if p.Kind() != reflect.Pointer || p.IsNil() || p.Elem().Kind() != reflect.Struct {
		return nil, fmt.Errorf("load config: want a pointer to a struct, got %T", v)
	}
	fields := make(map[string]field)
	return fields, walk(p.Elem(), "", func(f field) error {
		key := strings.NewReplacer(".", "_", "-", "_").Replace(strings.ToLower(f.path))
		if other, dup := fields[key]; dup {
			return fmt.Errorf("load config: fields %s and %s have the same name in the environment", other.path, f.path)
		}
		fields[key] = f
		return nil
	})
}

func walk(s reflect.Value, prefix string, visit func(field) error) error {
	for i := range s.NumField() {
		sf := s.Type().Field(i)
		name := fieldName(sf)
		if name == "" {
			continue
		}
		f := field{path: prefix + name, value: s.Field(i), secret: sf.Tag.Get("secret") == "true"}
		var err error
		switch {
		case scalar(f.value):
			err = visit(f)
		case sf.Anonymous && f.value.Kind() == reflect.Struct:
			err = walk(f.value, prefix, visit)
		case f.value.Kind() == reflect.Struct:
			err = walk(f.value, f.path+".", visit)
		case f.value.Kind() == reflect.Slice && scalar(reflect.New(f.value.Type().Elem()).Elem()):
			err = visit(f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fieldName is the name of a field in the file, "" when it has none.
func fieldName(sf reflect.StructField) string {
	if !sf.IsExported() {
		return ""
	}
	for _, tag := range []string{"yaml", "json"} {
		if t, ok := sf.Tag.Lookup(tag); ok {
			name, _, _ := strings.Cut(t, ",")
			if name == "-" {
				return ""
			}
			if name != "" {
				return name
			}
		}
	}
	return strings.ToLower(sf.Name)
}

// scalar says whether v is written as one word.
func scalar(v reflect.Value) bool {
	if v.CanAddr() {
		if _, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
			return true
		}
	}
	switch v.Kind() {
	case reflect.String, reflect.Bool, reflect.Float32, reflect.Float64,
		reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	}
	return false
}

// set stores text in the field. Lists are separated by commas; the empty text
// is the empty list.
func (f field) set(text string) error {
	shown := strconv.Quote(text)
	if f.secret {
		shown = "the value given"
	}
	if f.value.Kind() == reflect.Slice && !scalar(f.value) {
		list := reflect.MakeSlice(f.value.Type(), 0, 4)
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part == "" {
				continue
			}
			e := reflect.New(f.value.Type().Elem()).Elem()
			if want := setScalar(e, part); want != "" {
				return fmt.Errorf("%s: want a comma-separated list, each %s, not %s", f.path, want, shown)
			}
			list = reflect.Append(list, e)
		}
		f.value.Set(list)
		return nil
	}
	if want := setScalar(f.value, text); want != "" {
		return fmt.Errorf("%s: want %s, not %s", f.path, want, shown)
	}
	return nil
}

// setScalar stores text in v, or says what it wanted instead.
func setScalar(v reflect.Value, text string) (want string) {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if u.UnmarshalText([]byte(text)) != nil {
			return "a valid " + strings.ToLower(v.Type().Name())
		}
		return ""
	}
	if v.Type() == reflect.TypeFor[time.Duration]() {
		d, err := time.ParseDuration(text)
		if err != nil {
			return "a duration such as 30s or 5m"
		}
		v.SetInt(int64(d))
		return ""
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		if text != "true" && text != "false" {
			return "true or false"
		}
		v.SetBool(text == "true")
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, v.Type().Bits())
		if err != nil {
			return fmt.Sprintf("a whole number of %d bits", v.Type().Bits())
		}
		v.SetInt(n)
	case reflect.Float32, reflect.Float64:
		n, err := strconv.ParseFloat(text, v.Type().Bits())
		if err != nil {
			return "a number"
		}
		v.SetFloat(n)
	default:
		n, err := strconv.ParseUint(text, 10, v.Type().Bits())
		if err != nil {
			return fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<v.Type().Bits()-1)
		}
		v.SetUint(n)
	}
	return ""
}
