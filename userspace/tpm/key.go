// SPDX-License-Identifier: Apache-2.0

package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// signTime bounds the whole wait of one signature, the queue included.
const signTime = 10 * time.Second

// keyTemplate is what NewKey asks for: P-256, made inside the TPM, bound to
// it and to its parent for good. Its authorisation is empty: who reaches
// both the TPM and the key file may sign, which is what file modes guard.
var keyTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		UserWithAuth: true, NoDA: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
	}),
}

// Key is a P-256 signing key that lives in a TPM. It is a crypto.Signer for
// SHA-256 digests, safe for concurrent use.
type Key struct {
	tpm     *TPM
	public  *ecdsa.PublicKey
	pub     tpm2.TPM2BPublic
	private tpm2.TPM2BPrivate
	handle  tpm2.TPMHandle // guarded by tpm.slot; 0 when not loaded
	name    tpm2.TPM2BName
}

// Key loads the key that path holds, or makes one and stores it there (mode
// 0600, replaced atomically). ErrForeignKey says that the file was written
// by another TPM.
func (t *TPM) Key(path string) (*Key, error) {
	blob, err := statefile.Read(path, blobMax)
	switch {
	case err == nil:
		k, err := t.load(blob)
		if err != nil {
			return nil, fmt.Errorf("load TPM key %s: %w", path, err)
		}
		return k, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read TPM key: %w", err)
	}
	k, err := t.create()
	if err != nil {
		return nil, fmt.Errorf("create key in TPM %s: %w", t.address, err)
	}
	if err := statefile.Write(path, encodeBlob(k.pub, k.private)); err != nil {
		return nil, fmt.Errorf("store TPM key: %w", err)
	}
	return k, nil
}

// Public returns the *ecdsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Sign signs a SHA-256 digest; the random source is the TPM's own. The
// signature is ASN.1 DER as crypto/ecdsa writes it.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("sign in TPM %s: only SHA-256 digests, not %v of %d bytes", k.tpm.address, opts.HashFunc(), len(digest))
	}
	ctx, cancel := context.WithTimeout(context.Background(), signTime)
	defer cancel()
	digest = bytes.Clone(digest) // the TPM may read it after the caller gave up
	var signature []byte
	err := k.tpm.use(ctx, func() error {
		return k.tpm.retry(func() (err error) {
			if signature, err = k.signOnce(digest); err != nil && !isAnswer(err) {
				k.handle = 0 // once more from the stored blobs
			}
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("sign in TPM %s: %w", k.tpm.address, err)
	}
	return signature, nil
}

// attempts bounds how often a command is given again: neighbours that share the
// slots of a raw TPM may be in each other's way more than once.
const attempts = 8

// retry runs f with a link, and again where the link broke or the TPM lost an
// object meanwhile: a restarted swtpm, a resumed machine, a neighbour that frees
// what it finds in a TPM without a resource manager. The caller holds the slot.
func (t *TPM) retry(f func() error) (err error) {
	for range attempts {
		if err = t.connect(); err == nil {
			err = f()
		}
		if err == nil || isAnswer(err) {
			return err
		}
		// A new link frees what it finds as well: not where that is not needed,
		// or neighbours would take turns.
		if !errors.Is(err, tpm2.TPMRCHandle) && !errors.Is(err, tpm2.TPMRCReferenceH0) {
			t.disconnect()
		}
	}
	return err
}

// isAnswer says whether the TPM itself refused for a reason that loading
// the key again would not cure.
func isAnswer(err error) bool {
	if _, ok := errors.AsType[tpm2.TPMRC](err); !ok {
		return false
	}
	return !errors.Is(err, tpm2.TPMRCHandle) && !errors.Is(err, tpm2.TPMRCReferenceH0) && !errors.Is(err, tpm2.TPMRCInitialize) &&
		!errors.Is(err, tpm2.TPMRCObjectMemory)
}

// signOnce runs with the slot held, over a link.
func (k *Key) signOnce(digest []byte) ([]byte, error) {
	if k.handle == 0 {
		if err := k.loadLocked(); err != nil {
			return nil, err
		}
	}
	rsp, err := tpm2.Sign{
		KeyHandle:  tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: tpm2.PasswordAuth(nil)},
		Digest:     tpm2.TPM2BDigest{Buffer: digest},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(k.tpm.link)
	if err != nil {
		return nil, err
	}
	sig, err := rsp.Signature.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	der, err := asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(sig.SignatureR.Buffer), new(big.Int).SetBytes(sig.SignatureS.Buffer),
	})
	if err != nil {
		return nil, err
	}
	// A fault or another object under the same handle must not leave here as
	// a certificate's signature.
	if !ecdsa.VerifyASN1(k.public, digest, der) {
		return nil, errors.New("the signature does not verify under the key's public half")
	}
	return der, nil
}

func (t *TPM) create() (*Key, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	k := &Key{tpm: t}
	err := t.use(ctx, func() error {
		return t.retry(func() error {
			parent, err := t.primary()
			if err != nil {
				return err
			}
			defer t.flush(parent.Handle)
			rsp, err := tpm2.Create{ParentHandle: parent, InPublic: tpm2.New2B(keyTemplate)}.Execute(t.link)
			if err != nil {
				return err
			}
			k.pub, k.private = rsp.OutPublic, rsp.OutPrivate
			return k.loadUnder(parent)
		})
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

func (t *TPM) load(blob []byte) (*Key, error) {
	pub, private, err := decodeBlob(blob)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	k := &Key{tpm: t, pub: pub, private: private}
	err = t.use(ctx, func() error { return t.retry(k.loadLocked) })
	if err != nil {
		return nil, err
	}
	return k, nil
}

func (k *Key) loadLocked() error {
	parent, err := k.tpm.primary()
	if err != nil {
		return err
	}
	defer k.tpm.flush(parent.Handle)
	return k.loadUnder(parent)
}

func (k *Key) loadUnder(parent tpm2.AuthHandle) error {
	public, err := publicKey(k.pub)
	if err != nil {
		return err
	}
	rsp, err := tpm2.Load{ParentHandle: parent, InPrivate: k.private, InPublic: k.pub}.Execute(k.tpm.link)
	if errors.Is(err, tpm2.TPMRCIntegrity) {
		return fmt.Errorf("%w (remove the file to make a new key; certificates of the old one become void): %w", ErrForeignKey, err)
	}
	if err != nil {
		return err
	}
	k.public, k.handle, k.name = public, rsp.ObjectHandle, rsp.Name
	return nil
}

// primary derives the storage root from the owner seed. The same seed and
// template always give the same key.
func (t *TPM) primary() (tpm2.AuthHandle, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t.link)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return tpm2.AuthHandle{}, fmt.Errorf("the TPM's owner hierarchy has a password; clear it (tpm2_changeauth -c owner) or run with tpm: none: %w", err)
	}
	if err != nil {
		return tpm2.AuthHandle{}, fmt.Errorf("derive storage primary: %w", err)
	}
	return tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}, nil
}

// flush frees a slot; a TPM that refuses will say so at the next load.
func (t *TPM) flush(h tpm2.TPMHandle) {
	if t.link != nil {
		_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(t.link)
	}
}

// publicKey also holds the attributes against what was asked for: a blob
// that was swapped for a key made outside is not taken for one of the TPM.
func publicKey(pub tpm2.TPM2BPublic) (*ecdsa.PublicKey, error) {
	contents, err := pub.Contents()
	if err != nil {
		return nil, fmt.Errorf("parse public area: %w", err)
	}
	a := contents.ObjectAttributes
	if contents.Type != tpm2.TPMAlgECC || contents.NameAlg != tpm2.TPMAlgSHA256 ||
		!a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.SignEncrypt || a.Decrypt || a.Restricted {
		return nil, errors.New("the stored key is not a signing key made inside a TPM and fixed to it")
	}
	parameters, err := contents.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("parse key parameters: %w", err)
	}
	if parameters.CurveID != tpm2.TPMECCNistP256 {
		return nil, errors.New("the stored key is not of curve P-256")
	}
	point, err := contents.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("parse public point: %w", err)
	}
	if len(point.X.Buffer) > 32 || len(point.Y.Buffer) > 32 {
		return nil, errors.New("the public point is too long for P-256")
	}
	encoded := make([]byte, 65)
	encoded[0] = 4 // uncompressed (SEC 1, 2.3.3)
	copy(encoded[33-len(point.X.Buffer):33], point.X.Buffer)
	copy(encoded[65-len(point.Y.Buffer):], point.Y.Buffer)
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), encoded)
	if err != nil {
		return nil, fmt.Errorf("parse public point: %w", err)
	}
	return key, nil
}

// The key file: magic, then the public and the wrapped private area, each
// with a 16-bit big-endian length.
const (
	blobMagic = "sallyport tpm key 1\n"
	blobMax   = 4096
)

func encodeBlob(pub tpm2.TPM2BPublic, private tpm2.TPM2BPrivate) []byte {
	b := []byte(blobMagic)
	for _, part := range [][]byte{pub.Bytes(), private.Buffer} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
		b = append(b, part...)
	}
	return b
}

func decodeBlob(b []byte) (pub tpm2.TPM2BPublic, private tpm2.TPM2BPrivate, err error) {
	bad := errors.New("the file is damaged or not a TPM key file; remove it to make a new key")
	if len(b) > blobMax || !bytes.HasPrefix(b, []byte(blobMagic)) {
		return pub, private, bad
	}
	b = b[len(blobMagic):]
	var parts [2][]byte
	for i := range parts {
		if len(b) < 2 {
			return pub, private, bad
		}
		n := int(binary.BigEndian.Uint16(b))
		if b = b[2:]; n == 0 || n > len(b) {
			return pub, private, bad
		}
		parts[i], b = b[:n], b[n:]
	}
	if len(b) != 0 {
		return pub, private, bad
	}
	pub = tpm2.BytesAs2B[tpm2.TPMTPublic](parts[0])
	if _, err := publicKey(pub); err != nil {
		return pub, private, err
	}
	return pub, tpm2.TPM2BPrivate{Buffer: parts[1]}, nil
}
