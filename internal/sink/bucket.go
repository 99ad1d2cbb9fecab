package sink

import (
	"context"
	"errors"
	"io"
	"path"

	"github.com/minio/minio-go/v7"
)

// Validate reports every mistake by field name.
func (c *S3Config) Validate() error { return c.validate() }

// A Bucket takes files that others have made.
type Bucket struct{ s3 *s3 }

// OpenBucket prepares a bucket and contacts nobody. Of env it needs Identity, if
// the configuration asks for the SVID.
func OpenBucket(c *S3Config, env Env) (*Bucket, error) {
	p, err := c.open(env, "")
	if err != nil {
		return nil, err
	}
	s, ok := p.(*s3)
	if !ok {
		return nil, errors.New("not a bucket")
	}
	return &Bucket{s}, nil
}

// Put stores a file under a name, in the place of what is there.
func (b *Bucket) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	_, err := b.s3.client.PutObject(ctx, b.s3.cfg.Bucket, path.Join(b.s3.cfg.Prefix, name), r, size, minio.PutObjectOptions{
		ContentType: "application/octet-stream", DisableMultipart: true, SendContentMd5: true,
	})
	return err
}
